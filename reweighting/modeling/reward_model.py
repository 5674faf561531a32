"""A process reward model: a vision-language backbone and a small head that scores every step.

    model = ProcessRewardModel.from_backbone("Qwen/Qwen2-VL-2B-Instruct", lora_rank=16)   # to train one
    model = ProcessRewardModel.from_pretrained("weights/prm")                             # to use one
    model.score("photo.png", "How many red cells?", "Step 1: ...\\nStep 2: ...")          # [0.91, 0.13]
    model.rank("photo.png", "How many red cells?", responses)                             # [2, 0, 1]
    model.rank(["a.png", "b.png"], "Is <image> part of <image>?", responses)              # several images, in order

Notation:
    B  chains in a batch    S  steps of the longest chain    T  tokens    D  hidden size of the backbone
"""

import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from reweighting.data.chains import Chain
from reweighting.data.steps import split_response
from reweighting.errors import UserError
from reweighting.modeling.adapters import save_trained, set_trainable, strip_prefix, without_adapters
from reweighting.modeling.aggregation import AGGREGATIONS, AggregationName, aggregate
from reweighting.modeling.backbone_pass import states_at_ends
from reweighting.modeling.collate import Batch, collate, collate_states
from reweighting.modeling.config import TOKEN_HEADS, PRMConfig
from reweighting.modeling.fake_tensors import on_shapes
from reweighting.modeling.parts import load_parts, load_saved_weights
from reweighting.modeling.saved_model import BaseIdentity, SavedModel
from reweighting.modeling.score_head import initialize_from_tokens, random_head
from reweighting.modeling.scoring_batches import score_in_batches
from reweighting.modeling.scoring_inputs import (
    AnyImage,
    Images,
    check_batch_size,
    check_images,
    check_question,
    check_text,
    check_texts,
    one_line_errors,
)
from reweighting.modeling.sources import HEAD_FILE, ModelSource, new_source, saved_source
from reweighting.modeling.step_states import StepStates
from reweighting.modeling.tokenization import ChainTokenizer, EncodedChain, Pixels

CACHE_BYTES = 2**30  # of main memory in training, for images and tokens; and as much for step states
SCORING = threading.RLock()  # held while a model is in evaluation mode for a call, and its tokenizer in use


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
        base_identity: of the pretrained weights, if they are not saved with the model.
        step_states: remembers what a frozen backbone gives the head, for training the head alone; None: nothing is.
    """

    def __init__(self, backbone: PreTrainedModel | PeftModel, chain_tokenizer: ChainTokenizer, config: PRMConfig):
        super().__init__()
        self.backbone, self.chain_tokenizer, self.config = backbone, chain_tokenizer, config
        self.base_identity: BaseIdentity | None = None
        self.step_states: StepStates | None = None
        self.gradient_checkpointing = False
        self.score_head = random_head(config.score_head, backbone.config.get_text_config().hidden_size)
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
        """Make a reward model to train: on a pretrained backbone with a new head, or from a saved reward model.

        A saved reward model is continued: with its head, its adapters, and its settings where none are given.

        Args:
            name_or_path: a folder, or a backbone's name on the Hugging Face hub.
            dtype: of a frozen base; whatever is trained is float32.
            device: where to; on `meta` no weight is read, and the tensors take no memory (see `fake_tensors.py`).
            gradient_checkpointing: recompute activations: less memory, about a third more compute.
            attn_implementation: "sdpa", "eager" or "flash_attention_2".
            **settings: attributes of `PRMConfig`; a `lora_rank` alone means LoRA.

        Returns:
            The model in training mode. A `linear` or `mlp` head is drawn from torch's global generator.

        Raises:
            UserError: the model cannot be loaded, or settings contradict each other or the saved model's.
        """
        device = torch.device(device)
        source = new_source(name_or_path, settings, dtype, read_weights=device.type != "meta")
        if device.type == "meta":
            with device:
                model = cls._assemble(source, device, attn_implementation, gradient_checkpointing, CACHE_BYTES)
            on_shapes(model)
            return model.train()
        if source.trained is not None:
            print(source.description)
        model = cls._assemble(source, device, attn_implementation, gradient_checkpointing, CACHE_BYTES)
        if source.trained is None and source.config.score_head in TOKEN_HEADS:
            head = cast(nn.Linear, model.score_head)
            initialize_from_tokens(head, source.config, model.base, model.chain_tokenizer.tokenizer)
        return model.to(device).train()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        backbone: str | Path | None = None,
        allow_changed_base: bool = False,
        device: torch.device | str = "cpu",
        gradient_checkpointing: bool = False,
        attn_implementation: str = "sdpa",
    ) -> "ProcessRewardModel":
        """Load a model that `save_pretrained` wrote: with the same scores, to the bit, and the same trained weights.

        Args:
            folder: the model's.
            backbone: where the base of a model that was not trained as a whole is now, if it has moved.
            allow_changed_base: use the base even if its weights are not those that the model was trained on.
            device: where to.
            gradient_checkpointing: as in `from_backbone`.
            attn_implementation: as in `from_backbone`.

        Returns:
            The model in evaluation mode.

        Raises:
            UserError: a file is missing, damaged or not the one that was saved, or the base is not.
        """
        device = torch.device(device)
        source = saved_source(folder, backbone, allow_changed_base)
        # A model in use visits each row once: cached images would only take memory.
        model = cls._assemble(source, device, attn_implementation, gradient_checkpointing, cache_bytes=0)
        return model.to(device).eval()

    @classmethod
    def _assemble(
        cls, source: ModelSource, device: torch.device, attn: str, checkpointing: bool, cache_bytes: int
    ) -> "ProcessRewardModel":
        """Load the parts and put them together, for both constructors."""
        config = source.config
        backbone, chain_tokenizer = load_parts(source, device, attn, cache_bytes)
        model = cls(backbone, chain_tokenizer, config)
        model.base_identity = source.base
        set_trainable(model.base, config)
        if not (config.trains_vision or config.trains_projector):  # otherwise cached features would be outdated
            chain_tokenizer.encode_image = model.encode_image
        model.gradient_checkpointing = checkpointing
        if checkpointing:
            # The non-reentrant kind gives exact gradients also where no input needs one (frozen base).
            backbone.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if source.trained is not None and device.type != "meta":
            load_saved_weights(backbone, model.score_head, source.trained)
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
        SavedModel.write(folder, self.config, self.base_identity)

    @property
    def head_input(self) -> Tensor:
        """Return the weight [..., D] that the hidden states meet first: they go to its device and dtype."""
        return next(self.score_head.parameters())

    @property
    def base(self) -> PreTrainedModel:
        """Return the transformers model itself, without the adapters around it."""
        return without_adapters(self.backbone)

    @contextmanager
    def attention(self, implementation: str) -> Generator[None, None, None]:
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
        lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
        layers = max(lists, key=lambda modules: sum(parameter.numel() for parameter in modules.parameters()))
        return decoder, list(layers)

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
        device = self.head_input.device
        inputs = {name: tensor.to(device) for name, tensor in pixels.inputs.items()}
        # Tensors made in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            return self.chain_tokenizer.family.encode_image(self.base, inputs).cpu()

    def forward(self, batch: Batch) -> Tensor:
        """Compute step logits. The backbone runs under the caller's autocast, the head never does.

        Args:
            batch: B chains with at most S steps, on the model's device.

        Returns:
            Logits z [B, S], float32; 0 where there is no step.
        """
        at_ends = batch.states  # [B, S, D]
        if at_ends is None:
            at_ends = states_at_ends(self.backbone, self.base, self.chain_tokenizer.family, batch)
        # Soft labels differ in the second decimal: bfloat16's three digits are too few for the head.
        with torch.autocast(at_ends.device.type, enabled=False):
            logits = self.score_head(at_ends.to(self.head_input.dtype)).squeeze(-1)  # [B, S]
        return logits.masked_fill(~batch.step_mask, 0.0)

    def make_batch(self, chains: Sequence[Chain]) -> Batch:
        """Make a batch of chains whose images are files, on the model's device.

        Args:
            chains: the chains, at least one.

        Returns:
            The batch; with states in place of tokens, where these are remembered.

        Raises:
            UserError: as `ChainTokenizer.encode`.
        """
        if self.step_states is None:
            return self.collate([self.chain_tokenizer.encode(chain) for chain in chains])
        return collate_states(chains, [self.step_states.of(chain) for chain in chains]).to(self.head_input.device)

    def collate(self, encoded: Sequence[EncodedChain]) -> Batch:
        """Collate encoded chains into a batch of the kind that is fastest for this model, on its device.

        Args:
            encoded: the chains, at least one.

        Returns:
            The batch.
        """
        return collate(encoded, self.shares_prompts).to(self.head_input.device)

    def chain_logits(
        self, chains: Sequence[Chain], batch_size: int = 8, images: Sequence[Pixels] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute step logits without gradients; dropout is off meanwhile.

        Chains with the same images share their features, over any number of batches. Calls from several threads take
        turns; none may score while another one trains the model.

        Args:
            chains: N chains with at most S steps.
            batch_size: chains in a forward pass.
            images: replace each chain's own, if they are not files (from `chain_tokenizer.read_images`).

        Returns:
            Step logits [N, S] and step mask [N, S] bool, on the CPU.

        Raises:
            TypeError: `batch_size` is no int.
            UserError: as `ChainTokenizer.encode`, and if a score is not a finite number.
        """
        check_batch_size(batch_size)
        with SCORING, one_line_errors():
            logits, mask = score_in_batches(self, chains, batch_size, images)
        if not logits.isfinite().all():
            raise UserError("the reward model gives scores that are not finite: its training may have diverged.")
        return logits, mask

    def score(self, image: Images, question: str, steps: str | Iterable[str]) -> list[float]:
        """Score the steps of one response.

        Args:
            image: a file, an image in memory, a list of these, or None.
            question: the question; it may be blank, if the image holds it. The images stand before it, or at its
                `<image>` placeholders, one for each.
            steps: the steps, or a response that is split at its `Step N` markers; none may be blank.

        Returns:
            One score in (0, 1) per step: how likely the reasoning up to there leads to a correct answer.

        Raises:
            TypeError: an argument is of another kind.
            UserError: an image cannot be read, the placeholders do not fit the images, the text is longer than the
                model takes, or there is no step.
        """
        steps = split_response(check_text("steps", steps)) if isinstance(steps, str) else check_texts("steps", steps)
        if not steps:
            raise UserError("steps: there is no step to score.")
        images = check_images(image)
        question = check_question(question, len(images))
        logits, _ = self.chain_logits([Chain(question, tuple(steps))], images=self._read(images))
        return logits[0].sigmoid().tolist()

    def rank(
        self,
        image: Images,
        question: str,
        responses: Iterable[str],
        aggregation: AggregationName | None = None,
        batch_size: int = 8,
    ) -> list[int]:
        """Rank responses to a question.

        Args:
            image: a file, an image in memory, a list of these, or None.
            question: the question; it may be blank, if the image holds it. The images stand before it, or at its
                `<image>` placeholders, one for each.
            responses: the candidates; none may be blank.
            aggregation: how steps become one number, a name in `AGGREGATIONS`; None: as the model was trained.
            batch_size: chains in a forward pass.

        Returns:
            Indices of the responses, best first; equal ones stay in order.

        Raises:
            TypeError: as `score`.
            UserError: as `score`, and for an unknown aggregation or a batch size below 1.
        """
        name = aggregation or self.config.aggregation
        if name not in AGGREGATIONS:
            raise UserError(f"aggregation: found {name}, allowed: {', '.join(AGGREGATIONS)}")
        check_batch_size(batch_size)
        responses = check_texts("responses", responses)
        images = check_images(image)
        question = check_question(question, len(images))
        if not responses:
            return []
        # Equal responses are scored once: in a batch they could differ in the last bits.
        distinct = list(dict.fromkeys(responses))
        chains = [Chain(question, tuple(split_response(text))) for text in distinct]
        logits, mask = self.chain_logits(chains, batch_size, self._read(images))
        values = aggregate(logits, mask, name).tolist()  # of the distinct responses
        value_of = dict(zip(distinct, values, strict=True))
        return sorted(range(len(responses)), key=lambda i: -value_of[responses[i]])

    def _read(self, images: Sequence[AnyImage]) -> tuple[Pixels, ...]:
        with one_line_errors():
            return self.chain_tokenizer.read_images(images)
