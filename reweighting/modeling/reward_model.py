"""A process reward model: a vision-language backbone and a linear head that scores every step.

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
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from reweighting.data.chains import Chain
from reweighting.data.steps import split_response
from reweighting.errors import LISTED_PROBLEMS, UserError
from reweighting.modeling.adapters import (
    add_adapters,
    load_projector,
    required_files,
    save_trained,
    set_trainable,
    strip_prefix,
)
from reweighting.modeling.aggregation import AGGREGATIONS, AggregationName, aggregate
from reweighting.modeling.collate import Batch, Tokens, collate
from reweighting.modeling.config import PRMConfig, check_settings, with_defaults
from reweighting.modeling.fake_tensors import on_shapes
from reweighting.modeling.loading import load_backbone, load_image_processor, load_tokenizer
from reweighting.modeling.score_head import initialize_from_tokens, random_head
from reweighting.modeling.tokenization import ChainTokenizer, EncodedChain, Pixels

CACHE_BYTES = 2**30  # of main memory for images and tokens, in training
HEAD_FILE = "score_head.safetensors"


class ProcessRewardModel(nn.Module):
    """Score reasoning steps: `sigmoid(model(batch))` are the step scores.

    Args:
        backbone: a transformers model without LM head, wrapped by peft if it has adapters.
        chain_tokenizer: prepares chains for the backbone.
        config: the model's settings.

    Attributes:
        backbone: as given.
        score_head: from hidden states [..., D] to logits [..., 1], float32.
        chain_tokenizer: as given.
        config: as given.
    """

    def __init__(self, backbone: PreTrainedModel | PeftModel, chain_tokenizer: ChainTokenizer, config: PRMConfig):
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
        **settings: Any,
    ) -> "ProcessRewardModel":
        """Make a reward model with a new head on a pretrained backbone.

        Args:
            name_or_path: the backbone: a folder, or a name on the Hugging Face hub.
            dtype: of a frozen base; whatever is trained is float32.
            device: where to; on `meta` no weight is read, and the tensors take no memory (see `fake_tensors.py`).
            gradient_checkpointing: recompute activations: less memory, about a third more compute.
            attn_implementation: "sdpa", "eager" or "flash_attention_2".
            **settings: attributes of `PRMConfig`; a `lora_rank` alone means LoRA.

        Returns:
            The model in training mode. A linear head is drawn from torch's global generator.

        Raises:
            UserError: the backbone cannot be loaded, or settings contradict each other.
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
            base = load_backbone(config.backbone, config, device, attn_implementation)
            backbone = add_adapters(base, config) if config.adapted else base
            model = cls._assemble(backbone, config.backbone, config, gradient_checkpointing, CACHE_BYTES)
        if device.type == "meta":
            on_shapes(model)
            return model.train()
        if config.score_head != "linear":
            initialize_from_tokens(model.score_head, config, base, model.chain_tokenizer.tokenizer)
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
        """Load a model that `save_pretrained` wrote: with the same scores, to the bit, and the same trained weights.

        Args:
            folder: the model's.
            backbone: where the base of a model that was not trained as a whole is now, if it has moved.
            device: where to.
            gradient_checkpointing: as in `from_backbone`.
            attn_implementation: as in `from_backbone`.

        Returns:
            The model in evaluation mode.

        Raises:
            UserError: a file is missing or damaged, or the base is not where it was.
        """
        folder = Path(folder)
        config = PRMConfig.read(folder)
        for name in (HEAD_FILE, *required_files(config)):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: {name} is missing; the reward model was not saved completely.")
        base_name = str(folder if config.train == "full" else backbone or config.backbone)
        try:
            base = load_backbone(base_name, config, device, attn_implementation)
            loaded = PeftModel.from_pretrained(base, folder, is_trainable=True) if config.adapted else base
            # A model in use visits each row once: cached images would only take memory.
            model = cls._assemble(loaded, str(folder), config, gradient_checkpointing, cache_bytes=0)
            load_projector(base, config, folder)
            model.score_head.load_state_dict(load_file(folder / HEAD_FILE))
        except UserError as error:
            hint = "" if Path(base_name).is_dir() else " If the model's base has moved, name it (`backbone`)."
            raise UserError(f"{folder}: {error}{hint}") from error
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: a file of the saved reward model is damaged: {error}") from error
        return model.to(device).eval()

    @classmethod
    def _assemble(
        cls,
        backbone: PreTrainedModel | PeftModel,
        processor: str,
        config: PRMConfig,
        checkpointing: bool,
        cache_bytes: int,
    ) -> "ProcessRewardModel":
        """Put a model together, for both constructors. `processor`: where tokenizer and image processor are."""
        chain_tokenizer = ChainTokenizer(
            load_tokenizer(processor),
            load_image_processor(processor),
            backbone.config,
            max_length=config.max_length,
            max_image_side=config.max_image_side,
            cache_bytes=cache_bytes,
        )
        model = cls(backbone, chain_tokenizer, config)
        set_trainable(model.base, config)
        if not (config.trains_vision or config.trains_projector):  # otherwise cached features would be outdated
            chain_tokenizer.encode_image = model.encode_image
        model.gradient_checkpointing = checkpointing
        if checkpointing:
            # The non-reentrant kind gives exact gradients also where no input needs one (frozen base).
            backbone.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return model

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Save the model in Hugging Face's layout: backbone or adapters, processors, head and settings.

        Args:
            folder: where to; made if it is missing.
            weights: the complete state dict, if this process holds only parts of the parameters.
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
    def base(self) -> PreTrainedModel:
        """Return the transformers model itself, without the adapters around it."""
        return self.backbone.get_base_model() if isinstance(self.backbone, PeftModel) else self.backbone

    @contextmanager
    def attention(self, implementation: str) -> Iterator[None]:
        """Change how attention is computed while a `with` block runs.

        Forward-mode and second derivatives need "eager": fused kernels have none.

        Args:
            implementation: "sdpa", "eager" or "flash_attention_2".
        """
        before = self.base.config._attn_implementation
        self.base.set_attn_implementation(implementation)
        try:
            yield
        finally:
            self.base.set_attn_implementation(before)

    def language_model_layers(self) -> tuple[nn.Module, list[nn.Module]]:
        """Return the language model and its transformer layers."""
        decoder = self.base.get_decoder()
        return decoder, list(decoder.layers)

    @property
    def holds_full_parameters(self) -> bool:
        """Tell whether this process holds all of every parameter, not a shard of it (see `distributed/sharding.py`)."""
        return not hasattr(next(self.base.get_decoder().parameters()), "placements")

    @property
    def shares_prompts(self) -> bool:
        """Tell whether several chains can continue from one pass over their prompt."""
        if not self.holds_full_parameters:  # all processes must make the same passes, whatever prompts they have
            return False
        if self.training and self.gradient_checkpointing:  # it discards the cache from which the steps would continue
            return False
        return self.chain_tokenizer.family.shares_prompts

    def encode_image(self, pixels: Pixels) -> Tensor:
        """Compute the features of one image.

        Args:
            pixels: the image.

        Returns:
            Output of vision tower and projector, [image tokens, ...], on the CPU and without gradients.
        """
        device = self.score_head.weight.device
        inputs = {name: tensor.to(device) for name, tensor in pixels.inputs.items()}
        # Tensors made in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            return self.chain_tokenizer.family.encode_image(self.backbone, inputs).cpu()

    def forward(self, batch: Batch) -> Tensor:
        """Compute step logits. The backbone runs under the caller's autocast, the head never does.

        Args:
            batch: B chains with at most S steps, on the model's device.

        Returns:
            Logits z [B, S], float32; 0 where there is no step.
        """
        if batch.prompts is None:
            hidden = self._hidden_states(batch.tokens, use_cache=False)  # [B, T, D]
        else:
            hidden = self._hidden_states_after_prompts(batch)  # [B, T, D]
        ends = batch.step_ends[:, :, None].expand(-1, -1, hidden.shape[-1])
        at_ends = hidden.gather(1, ends)  # [B, S, D]
        # Soft labels differ in the second decimal: bfloat16's three digits are too few for the head.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.score_head(at_ends.to(self.score_head.weight.dtype)).squeeze(-1)  # [B, S]
        return logits.masked_fill(~batch.step_mask, 0.0)

    def _hidden_states(self, tokens: Tokens, **options: Any) -> Tensor:
        """Run the backbone once: hidden states [B, T, D]."""
        inputs = self.chain_tokenizer.family.model_inputs(tokens)
        return self.backbone(**inputs, **options).last_hidden_state

    def _hidden_states_after_prompts(self, batch: Batch) -> Tensor:
        """Run the backbone on each prompt once, then on the steps: hidden states [B, T, D] of the steps. Gradients flow
        through both passes."""
        prompts, prompt_of = batch.prompts, batch.prompt_of
        assert prompts is not None and prompt_of is not None
        positions, next_position = self._prompt_positions(prompts)
        cache = DynamicCache()
        self._hidden_states(prompts, position_ids=positions, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(prompt_of)
        length = batch.tokens.input_ids.shape[1]
        tokens = replace(
            batch.tokens,
            attention_mask=torch.cat([prompts.attention_mask[prompt_of], batch.tokens.attention_mask], dim=1),
        )
        after = next_position[prompt_of, None] + torch.arange(length, device=next_position.device)  # [B, T]
        return self._hidden_states(tokens, position_ids=after, past_key_values=cache, use_cache=True)

    def _prompt_positions(self, prompts: Tokens) -> tuple[Tensor, Tensor]:
        """Compute the position ids of prompts, [Q, T] or [3, Q, T], and of the first token after each, [Q]."""
        family, mask = self.chain_tokenizer.family, prompts.attention_mask
        positions = family.position_ids(self.base, family.model_inputs(prompts))
        if positions is None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
        return positions, positions.masked_fill(mask == 0, 0).amax(-1).view(-1, len(mask)).amax(0) + 1

    def collate(self, encoded: Sequence[EncodedChain]) -> Batch:
        """Collate encoded chains into a batch of the kind that is fastest for this model, on its device.

        Args:
            encoded: the chains, at least one.

        Returns:
            The batch.
        """
        return collate(encoded, self.shares_prompts).to(self.score_head.weight.device)

    def check(self, chains: Iterable[Chain]) -> None:
        """Check every chain once, so that one that is too long is found before hours of computing.

        Args:
            chains: all chains of a run.

        Raises:
            UserError: names the rows of the chains that `ChainTokenizer.check` refuses.
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
        """Compute step logits without gradients; dropout is off meanwhile.

        Neighbors with the same image share its features, over any number of batches.

        Args:
            chains: N chains with at most S steps.
            batch_size: chains in a forward pass.
            pixels: replaces the chains' images, if the image is not a file (from `chain_tokenizer.read_image`).

        Returns:
            Step logits [N, S] and step mask [N, S] bool, on the CPU.

        Raises:
            UserError: as `ChainTokenizer.encode`, and if a score is not a finite number.
        """
        tokenizer = self.chain_tokenizer
        if tokenizer.encode_image is None and self.holds_full_parameters:
            tokenizer = tokenizer.with_image_encoder(self.encode_image)
        pixels = pixels and tokenizer.with_features(pixels)
        steps = max((len(chain.steps) for chain in chains), default=0)
        # Made outside inference mode, so that the caller can compute with them in any way.
        logits, mask = torch.zeros(len(chains), steps), torch.zeros(len(chains), steps, dtype=torch.bool)
        was_training = self.training
        self.eval()
        try:
            # Sharded layers could not be trained with tensors that they gather in inference mode.
            with torch.inference_mode() if self.holds_full_parameters else torch.no_grad():
                for start in range(0, len(chains), batch_size):
                    part = chains[start : start + batch_size]
                    batch = self.collate([tokenizer.encode(chain, pixels) for chain in part])
                    z = self(batch)
                    logits[start : start + len(part), : z.shape[1]] = z.cpu()
                    mask[start : start + len(part), : z.shape[1]] = batch.step_mask.cpu()
        finally:
            self.train(was_training)
        if not logits.isfinite().all():
            raise UserError("the reward model gives scores that are not finite: its training may have diverged.")
        return logits, mask

    def score(self, image: str | Path | Image.Image | None, question: str, steps: str | Sequence[str]) -> list[float]:
        """Score the steps of one response.

        Args:
            image: a file, an image in memory, or None.
            question: the question.
            steps: a list of steps, or a response that is split at its `Step N` markers.

        Returns:
            One score in (0, 1) per step: how likely the reasoning up to there leads to a correct answer.

        Raises:
            UserError: the image cannot be read, the text is longer than the model takes, or there is no step.
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
        aggregation: AggregationName | None = None,
        batch_size: int = 8,
    ) -> list[int]:
        """Rank responses to a question.

        Args:
            image: a file, an image in memory, or None.
            question: the question.
            responses: the candidates.
            aggregation: how steps become one number, a name in `AGGREGATIONS`; None: as the model was trained.
            batch_size: chains in a forward pass.

        Returns:
            Indices of the responses, best first; equal ones stay in order.

        Raises:
            UserError: as `score`, and for an unknown aggregation.
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
        values = aggregate(logits, mask, aggregation).tolist()  # of the distinct responses
        value_of = dict(zip(distinct, values, strict=True))
        return sorted(range(len(responses)), key=lambda i: -value_of[responses[i]])
