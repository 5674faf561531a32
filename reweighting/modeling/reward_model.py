"""The process reward model: a vision-language backbone and a linear head that scores every step.

    model = ProcessRewardModel.from_backbone("Qwen/Qwen2-VL-2B-Instruct", lora_rank=16)   # to train one
    model = ProcessRewardModel.from_pretrained("weights/prm")                             # to use one
    model.score("photo.png", "How many red cells?", "Step 1: ...\\nStep 2: ...")          # [0.91, 0.13]
    model.rank("photo.png", "How many red cells?", responses)                             # [2, 0, 1]

Notation:
    B  chains in a batch    S  steps of the longest chain    T  tokens    D  hidden size of the backbone
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, DynamicCache
from transformers.processing_utils import ProcessorMixin

from reweighting.data.chains import Chain, split_response
from reweighting.errors import LISTED_PROBLEMS, UserError
from reweighting.modeling.adapters import (
    add_adapters,
    choose_trained,
    four_bit,
    load_projector,
    save_trained,
    saved_files,
    strip_prefix,
)
from reweighting.modeling.aggregation import AGGREGATIONS, aggregate
from reweighting.modeling.collate import Batch, Tokens, collate
from reweighting.modeling.config import PRMConfig, check_settings, with_defaults
from reweighting.modeling.fake_tensors import on_shapes
from reweighting.modeling.score_head import random_head, start_from_tokens
from reweighting.modeling.tokenization import ChainTokenizer, EncodedChain, Pixels

CACHE_BYTES = 2**30  # of main memory for the images and tokens of a training run
HEAD_FILE = "score_head.safetensors"


class ProcessRewardModel(nn.Module):
    """Backbone, score head and the tokenizer that feeds them; `sigmoid(model(batch))` are the step scores.

    Attributes: `backbone` (a transformers model without LM head, wrapped by peft where it has adapters),
    `score_head` (nn.Linear(D, 1), float32), `chain_tokenizer`, `config`.
    """

    def __init__(self, backbone: nn.Module, chain_tokenizer: ChainTokenizer, config: PRMConfig):
        super().__init__()
        self.backbone, self.chain_tokenizer, self.config = backbone, chain_tokenizer, config
        self.gradient_checkpointing = False
        self.score_head = random_head(backbone.config.get_text_config().hidden_size)
        self.score_head.requires_grad_(config.score_head != "token")

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        gradient_checkpointing: bool = False,
        attn_implementation: str = "sdpa",
        **settings,
    ) -> "ProcessRewardModel":
        """A model with a fresh head on a pretrained backbone (hub name or folder).

        `settings`: those of PRMConfig; a `lora_rank` alone means LoRA. `dtype`: of a frozen base.
        `gradient_checkpointing` trades about a third more compute for memory. The head's start is drawn
        from torch's global generator. The model comes in training mode. With `device` meta no weight is read, and
        its tensors have no memory (see `fake_tensor_memory.py`). Raises UserError if the backbone cannot be loaded, or
        settings contradict each other.
        """
        folder = Path(name_or_path)
        settings["backbone"] = str(folder.resolve() if folder.is_dir() else name_or_path)
        config = PRMConfig(dtype=str(dtype).removeprefix("torch."), **with_defaults(settings))
        check_settings(config)
        if config.train == "full" and dtype != torch.float32:
            raise UserError(
                f"a backbone that is trained as a whole must be float32, not {config.dtype}: at small "
                "learning rates half-precision parameters stop moving. Use autocast, or train adapters."
            )
        device = torch.device(device)
        with device if device.type == "meta" else nullcontext():
            base = _load_backbone(config.backbone, config, device, attn_implementation)
            backbone = add_adapters(base, config) if config.adapted else base
            model = cls._assemble(backbone, config.backbone, config, gradient_checkpointing, CACHE_BYTES)
        if device.type == "meta":
            return on_shapes(model).train()
        if config.score_head != "linear":
            start_from_tokens(model.score_head, config, base, model.chain_tokenizer.tokenizer)
        return model.to(device).train()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        backbone: str | Path | None = None,
        device: torch.device | str = "cpu",
        gradient_checkpointing: bool = False,
        attn_implementation: str = "sdpa",
    ) -> "ProcessRewardModel":
        """The model that `save_pretrained` wrote: same scores to the bit, same parameters trainable.

        It comes in eval mode. `backbone` says where the base of a model that was not trained as a whole is now, if
        it has moved. Weights are read from safetensors files only. Raises UserError if something is missing.
        """
        folder = Path(folder)
        config = PRMConfig.read(folder)
        for name in (HEAD_FILE, *saved_files(config)):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: {name} is missing; the reward model was not saved completely.")
        place = str(folder if config.train == "full" else backbone or config.backbone)
        try:
            base = _load_backbone(place, config, torch.device(device), attn_implementation)
            loaded = PeftModel.from_pretrained(base, folder, is_trainable=True) if config.adapted else base
            # Whoever uses a model visits a row once: remembered images would only fill the memory.
            model = cls._assemble(loaded, str(folder), config, gradient_checkpointing, cache_bytes=0)
            load_projector(base, config, folder)
            model.score_head.load_state_dict(load_file(folder / HEAD_FILE))
        except UserError as error:
            hint = "" if Path(place).is_dir() else " If the model's base has moved, name it (`backbone`)."
            raise UserError(f"{folder}: {error}{hint}") from error
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: a file of the saved reward model is damaged: {error}") from error
        return model.to(device).eval()

    @classmethod
    def _assemble(cls, backbone: nn.Module, processor: str, config: PRMConfig, checkpointing: bool, cache_bytes: int):
        """Both constructors' second half. `processor`: where tokenizer and image processor are."""
        chain_tokenizer = ChainTokenizer(
            _load_tokenizer(processor),
            _load(AutoImageProcessor, processor),
            backbone.config,
            max_length=config.max_length,
            max_image_side=config.max_image_side,
            cache_bytes=cache_bytes,
        )
        model = cls(backbone, chain_tokenizer, config)
        choose_trained(model.base, config)
        if not (config.trains_vision or config.trains_projector):  # else features would be those of an earlier step
            chain_tokenizer.encode_image = model.encode_image
        model.gradient_checkpointing = checkpointing
        if checkpointing:
            # The non-reentrant kind gives exact gradients also where the inputs need none (frozen base).
            backbone.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return model

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the model in Hugging Face's layout: backbone (or adapters), processors, head, config.

        `weights`: the whole state dict, where this process holds only parts of the parameters.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.backbone, self.config, folder, weights and strip_prefix(weights, "backbone."))
        weights = weights or self.state_dict()
        self.chain_tokenizer.save_pretrained(folder)
        head = {name: tensor.cpu() for name, tensor in strip_prefix(weights, "score_head.").items()}
        save_file(head, folder / HEAD_FILE)
        self.config.save(folder)

    @property
    def base(self) -> nn.Module:
        """The transformers model itself, without the adapters around it."""
        return self.backbone.get_base_model() if self.config.adapted else self.backbone

    @contextmanager
    def attention(self, implementation: str) -> Iterator[None]:
        """Compute attention this way meanwhile (a value of --attention): forward-mode and second derivatives go
        through "eager", and not through fused kernels."""
        before = self.base.config._attn_implementation
        self.base.set_attn_implementation(implementation)
        try:
            yield
        finally:
            self.base.set_attn_implementation(before)

    def language_model_layers(self) -> tuple[nn.Module, list[nn.Module]]:
        """The language model, and its transformer layers."""
        decoder = self.base.get_decoder()
        return decoder, list(decoder.layers)

    @property
    def is_whole(self) -> bool:
        """Whether this process holds all of every parameter, not a part as in `sharding.Sharded`."""
        return not hasattr(next(self.base.get_decoder().parameters()), "placements")

    def encode_image(self, pixels: Pixels) -> Tensor:
        """What the vision tower makes of one image: features [image tokens, …] on the CPU, without gradients."""
        device = self.score_head.weight.device
        inputs = {name: tensor.to(device) for name, tensor in pixels.inputs.items()}
        # Tensors of inference mode could not be trained on later.
        with torch.inference_mode(False), torch.no_grad():
            return self.chain_tokenizer.family.encode_image(self.backbone, inputs).cpu()

    def forward(self, batch: Batch) -> Tensor:
        """Step logits z [B, S], float32; 0 where there is no step. The backbone runs under the caller's
        autocast, the head never does."""
        if batch.prompts is None:
            hidden = self._read(batch.tokens, use_cache=False)  # [B, T, D]
        else:
            hidden = self._read_after_prompts(batch)
        ends = batch.step_ends[:, :, None].expand(-1, -1, hidden.shape[-1])
        at_ends = hidden.gather(1, ends)  # [B, S, D]
        # Soft labels differ in the second decimal: bfloat16's three digits are too few for the head.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.score_head(at_ends.to(self.score_head.weight.dtype)).squeeze(-1)  # [B, S]
        return logits.masked_fill(~batch.step_mask, 0.0)

    def _read(self, tokens: Tokens, **options) -> Tensor:
        """Hidden states [B, T, D] of one pass of the backbone."""
        inputs = self.chain_tokenizer.family.model_inputs(tokens)
        return self.backbone(**inputs, **options).last_hidden_state

    def _read_after_prompts(self, batch: Batch) -> Tensor:
        """The same of what follows the prompts, each of which is read once. Gradients flow through both passes."""
        prompts, prompt_of = batch.prompts, batch.prompt_of
        positions, following = self._positions(prompts)
        cache = DynamicCache()
        self._read(prompts, position_ids=positions, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(prompt_of)
        length = batch.tokens.input_ids.shape[1]
        tokens = replace(
            batch.tokens,
            attention_mask=torch.cat([prompts.attention_mask[prompt_of], batch.tokens.attention_mask], dim=1),
        )
        after = following[prompt_of, None] + torch.arange(length, device=following.device)  # [B, T]
        return self._read(tokens, position_ids=after, past_key_values=cache, use_cache=True)

    def _positions(self, prompts: Tokens) -> tuple[Tensor, Tensor]:
        """The rotary positions of prompts, [Q, T] or one more axis before, and those of the tokens that follow, [Q]."""
        family, mask = self.chain_tokenizer.family, prompts.attention_mask
        positions = family.position_ids(self.base, family.model_inputs(prompts))
        if positions is None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
        return positions, positions.masked_fill(mask == 0, 0).amax(-1).view(-1, len(mask)).amax(0) + 1

    @property
    def shares_prompts(self) -> bool:
        """Whether chains of one question can go on from one pass over their prompt."""
        if not self.is_whole:  # all processes make the same passes, whatever prompts they have
            return False
        if self.training and self.gradient_checkpointing:  # it throws away what the steps would go on from
            return False
        return self.chain_tokenizer.family.shares_prompts

    def collate(self, encoded: Sequence[EncodedChain]) -> Batch:
        """Encoded chains as one batch of the kind that is fastest for this model, on its device."""
        return collate(encoded, self.shares_prompts).to(self.score_head.weight.device)

    def check(self, chains: Iterable[Chain]) -> None:
        """Look at every chain once, so that one that is too long is found before hours of computing, not in them.

        Raises UserError, naming the rows of all that `ChainTokenizer.check` refuses.
        """
        problems, total, count = [], 0, 0
        for chain in chains:
            count += 1
            try:
                self.chain_tokenizer.check(chain)
            except UserError as error:
                total += 1
                if total <= LISTED_PROBLEMS:
                    problems.append(str(error))
        if total:
            more = [f"… and {total - LISTED_PROBLEMS} more"] if total > LISTED_PROBLEMS else []
            raise UserError("\n".join([f"{total} of {count} chains cannot be used", *problems, *more]))

    def chain_logits(
        self, chains: Sequence[Chain], batch_size: int = 8, pixels: Pixels | None = None
    ) -> tuple[Tensor, Tensor]:
        """Step logits [N, S] and step mask [N, S] of N chains on the CPU, `batch_size` chains at a time.

        Neighbours with the same image share its features: the vision tower sees it once, however many batches they
        fill. Dropout is off meanwhile. `pixels` (from `chain_tokenizer.read_image`) stands in for the chains'
        images. Raises UserError as `ChainTokenizer.encode` does, and if a score is no number.
        """
        tokenizer = self.chain_tokenizer
        if tokenizer.encode_image is None and self.is_whole:
            tokenizer = tokenizer.with_image_encoder(self.encode_image)
        pixels = pixels and tokenizer.with_features(pixels)
        steps = max((len(chain.steps) for chain in chains), default=0)
        # Made outside inference mode, so that the caller may go on computing with them in any way.
        logits, mask = torch.zeros(len(chains), steps), torch.zeros(len(chains), steps, dtype=torch.bool)
        was_training = self.training
        self.eval()
        try:
            # What sharded layers gather in inference mode could not be trained with later.
            with torch.inference_mode() if self.is_whole else torch.no_grad():
                for start in range(0, len(chains), batch_size):
                    part = chains[start : start + batch_size]
                    batch = self.collate([tokenizer.encode(chain, pixels) for chain in part])
                    z = self(batch)
                    logits[start : start + len(part), : z.shape[1]] = z.cpu()
                    mask[start : start + len(part), : z.shape[1]] = batch.step_mask.cpu()
        finally:
            self.train(was_training)
        if not logits.isfinite().all():
            raise UserError("the reward model gives scores that are no numbers: its training may have diverged.")
        return logits, mask

    def score(self, image: str | Path | Image.Image | None, question: str, steps: str | Sequence[str]) -> list[float]:
        """One score in (0, 1) per step: how likely the reasoning up to there still ends right.

        `steps`: a list of steps, or a response that is cut at its `Step N` markers.
        Raises UserError for an unreadable image, a text longer than the model takes, or no step.
        """
        steps = split_response(steps) if isinstance(steps, str) else steps
        if not steps:
            raise UserError("there is no step to score.")
        pixels = None if image is None else self.chain_tokenizer.read_image(image)
        logits, _ = self.chain_logits([Chain(question.strip(), tuple(steps))], pixels=pixels)
        return logits[0].sigmoid().tolist()

    def rank(
        self,
        image: str | Path | Image.Image | None,
        question: str,
        responses: Sequence[str],
        aggregation: str | None = None,
        batch_size: int = 8,
    ) -> list[int]:
        """Indices of the responses, best first (equals stay in order).

        `aggregation`: a name of `aggregation.AGGREGATIONS`; None: the one the model was trained for.
        Raises UserError as `score` does, and for a name that there is not.
        """
        aggregation = aggregation or self.config.aggregation
        if aggregation not in AGGREGATIONS:
            raise UserError(f"aggregation: found {aggregation}, allowed: {', '.join(AGGREGATIONS)}")
        if not responses:
            return []
        pixels = None if image is None else self.chain_tokenizer.read_image(image)
        # Equal responses are scored once: in a batch they could differ in the last bits.
        distinct = list(dict.fromkeys(responses))
        chains = [Chain(question.strip(), tuple(split_response(text))) for text in distinct]
        logits, mask = self.chain_logits(chains, batch_size, pixels)
        values = aggregate(logits, mask, aggregation).tolist()  # of the distinct ones
        place = {text: index for index, text in enumerate(distinct)}
        return sorted(range(len(responses)), key=lambda i: -values[place[responses[i]]])


def _load_backbone(name: str, config: PRMConfig, device: torch.device, attn_implementation: str) -> nn.Module:
    found = _load(AutoConfig, name)  # first, since the weights' own errors say less
    dtype, options = getattr(torch, config.dtype), {}
    if device.type == "meta":
        return AutoModel.from_config(found, dtype=dtype, attn_implementation=attn_implementation)
    if config.load_in_4bit:
        options = {"quantization_config": four_bit(found, dtype, device), "device_map": {"": device}}
    backbone, info = _load(
        AutoModel,
        name,
        dtype=dtype,
        attn_implementation=attn_implementation,
        use_safetensors=True,  # a pickle runs whatever code it holds
        output_loading_info=True,
        **options,
    )
    # transformers only warns, and goes on with random weights.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"the backbone {name} lacks {len(missing)} of its tensors, {missing[0]} for one.")
    return backbone


def _load_tokenizer(name: str):
    """The tokenizer, with the chat template of the checkpoint's processor if that has its own: it knows images."""
    tokenizer = _load(AutoTokenizer, name)
    processor, _ = _load(ProcessorMixin, name, method="get_processor_dict")
    tokenizer.chat_template = processor.get("chat_template") or tokenizer.chat_template
    return tokenizer


def _load(auto_class, name: str, method: str = "from_pretrained", **options):
    """auto_class.from_pretrained, its many kinds of error in one line that says what to do."""
    try:
        return getattr(auto_class, method)(name, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if Path(name).is_dir():
            problem = f"the folder {name} cannot be loaded by transformers' {auto_class.__name__}"
        else:
            problem = f"there is no folder {name}, and no model of that name came from the Hugging Face hub"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{problem} ({reason[0]}).") from error
