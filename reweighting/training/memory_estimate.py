"""What memory a run will take, by part, before any weight is loaded.

    model = ProcessRewardModel.from_backbone("backbone", device="meta")
    print(table(estimate(model, batch, meta_batch, MemoryScenario())))

The model is built from its config on tensors without memory, and one micro-batch of the longest chains goes through it
there, forward and backward (`fake_tensor_memory.py`): activations are counted, not guessed. What the optimizer and the
hypergradient keep follows from the number P of trained parameters.

The estimate counts tensors. A GPU also holds what CUDA itself takes (about half a gigabyte) and what its allocator
cannot use (5 to 10 % is usual). `benchmarks/memory_check.py` compares with measured peaks, on the CPU.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from reweighting.bilevel.hypergradients import make_hypergradient
from reweighting.bilevel.hypergradients.base import WindowMemory, WindowSize
from reweighting.bilevel.losses import STEP_LOSSES, mean_loss
from reweighting.config.training import TrainingConfig
from reweighting.data.chains import Chain, candidate_chains
from reweighting.devices import autocast
from reweighting.distributed import collectives
from reweighting.distributed.sharding import unsharded_parameters
from reweighting.modeling.aggregation import aggregate
from reweighting.modeling.collate import Batch, collate
from reweighting.modeling.reward_model import CACHE_BYTES, ProcessRewardModel
from reweighting.modeling.step_states import StepStates
from reweighting.training.build import meta_batch_size, micro_batches_per_step
from reweighting.training.fake_tensor_memory import forward_memory, step_memory
from reweighting.training.run_data import RunData

SAMPLED = 64  # chains that are tokenized to find the longest ones, beside those with most text
MOST_TEXT = 8
NF4 = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes of a weight in 4 bits, with its part of doubly quantised scales


@dataclass(frozen=True)
class MemoryScenario:
    """What the estimate depends on beside the model and its batches.

    Attributes:
        optimizer: Of the lower level, "adamw" or "sgd".
        lower_loss: A key of `losses.STEP_LOSSES`.
        precision: Of the compute, "fp32" or "bf16".
        hypergradient: A key of `hypergradients.METHODS`; None where no weights are learned.
        steps: Optimizer steps in a window.
        micro_batches: Micro-batches in a step.
        clipped: Whether steps are clipped.
        meta_batches: Batches in an update of the weights.
        images: Bytes of cached image features, where these are in the device's memory.
        step_states: Bytes of remembered step states, where these are in the device's memory.
        state_pass: Bytes that computing a chain's step states takes for a moment.
        device: Type of the device, "cpu" or "cuda".
        processes: Processes that make the run.
        sharded: Whether these shard the parameters, as `sharding.Sharded` does.
    """

    optimizer: str = "adamw"
    lower_loss: str = "mse"
    precision: str = "bf16"
    hypergradient: str | None = "unrolled"
    steps: int = 5
    micro_batches: int = 1
    clipped: bool = False
    meta_batches: int = 1
    images: int = 0
    step_states: int = 0
    state_pass: int = 0
    device: str = "cuda"
    processes: int = 1
    sharded: bool = False

    @property
    def partial_gradients(self) -> bool:
        """Whether a process's gradients are of its part of each batch only."""
        return self.processes > 1 and not self.sharded


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part, on one process.

    A step and the meta pass take turns, so `total`, the most at a time, is mostly less than the sum of the parts.

    Attributes:
        weights: All parameters and buffers.
        optimizer: The lower level's optimizer state.
        kept: What the hypergradient keeps of a window: gradients, or micro-batches.
        image_features: Cached ones, and a micro-batch with its own.
        step_states: Remembered ones, with --train head, and the pass that computes a chain's.
        activations: What the forward pass of a micro-batch leaves for the backward pass.
        gradients: All copies of a step's gradient that exist at once, without the kept ones.
        meta_pass: Activations and gradients of the meta loss, or what the hypergradient then takes, whichever is more.
        total: The most at a time.
    """

    weights: int
    optimizer: int
    kept: int
    image_features: int
    step_states: int
    activations: int
    gradients: int
    meta_pass: int
    total: int


def table(estimate: MemoryEstimate) -> str:
    """Format the parts as lines of text, in GB."""
    words = {name: name.replace("_", " ") for name in vars(estimate)}
    words |= {"kept": "kept gradients", "total": "most at a time"}
    parts = {name: count for name, count in vars(estimate).items() if count or name != "step_states"}
    return "\n".join(f"  {words[name]:<16}{count / 1e9:9.3f} GB" for name, count in parts.items())


def estimate(
    model: ProcessRewardModel, batch: Batch, meta_batch: Batch | None, scenario: MemoryScenario
) -> MemoryEstimate:
    """Estimate the memory of a run.

    Args:
        model: On tensors without memory (`device="meta"`).
        batch: One process's part of a micro-batch of the lower level, with real token ids.
        meta_batch: Likewise of the upper level; None where no weights are learned.
        scenario: The rest.
    """
    model.train()
    trained = [param for param in model.parameters() if param.requires_grad]
    weights, vector, gathered, shards = weight_bytes(model), _bytes(trained), 0, 1
    if scenario.sharded:
        shards = scenario.processes
        weights, vector, gathered = _sharded_bytes(model, shards)
    known = [*model.parameters(), *model.buffers(), *_tensors([batch, meta_batch])]

    def passes(loss: Callable[[], Tensor]) -> tuple[int, int]:
        activations, peak = step_memory(loss, trained, known, shards)
        return activations, peak + gathered

    optimizer = vector * (2 if scenario.optimizer == "adamw" else 1)
    features = scenario.images + _batch_bytes(batch)
    window = _window_memory(model, scenario, vector, _batch_bytes(batch))
    activations, peak = passes(lambda: _lower_loss(model, batch, scenario.precision, scenario.lower_loss))
    # The step's sum, whose memory is kept, and either a micro-batch's gradient or what comes of the sum.
    gradients = vector * (1 + max(1, scenario.partial_gradients + scenario.clipped))
    step = max(vector + peak, gradients)
    meta = 0
    if meta_batch is not None:
        meta_activations, meta_peak = passes(lambda: _upper_loss(model, meta_batch, scenario.precision))
        # The graphs of all its batches are there until the one backward pass, which sums their gradients.
        more = scenario.meta_batches - 1
        backward = meta_peak + more * meta_activations + (vector if more else 0)
        meta = vector + max(backward, 2 * vector, vector + window.compute)
    lasting = weights + optimizer + window.kept + features + scenario.step_states
    total = lasting + max(step, meta, scenario.state_pass)
    states = scenario.step_states + scenario.state_pass
    return MemoryEstimate(weights, optimizer, window.kept, features, states, activations, gradients, meta, total)


def _window_memory(model: nn.Module, scenario: MemoryScenario, vector: int, batch: int) -> WindowMemory:
    """What the hypergradient takes. vector: bytes of a vector [P]. batch: bytes of a micro-batch."""
    if scenario.hypergradient is None:
        return WindowMemory(0, 0)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = {"adamw": AdamW, "sgd": SGD}[scenario.optimizer](params)
    window = WindowSize(
        vector=vector,
        steps=scenario.steps,
        micro_batches=scenario.micro_batches,
        batch=batch,
        partial=scenario.partial_gradients,
        clipped=scenario.clipped,
        device=scenario.device,
    )
    return make_hypergradient(scenario.hypergradient, model, optimizer).memory_bytes(window)


def estimate_run(
    model: ProcessRewardModel,
    config: TrainingConfig,
    data: RunData,
    method: str | None,
    device: torch.device,
    precision: str,
) -> MemoryEstimate:
    """Estimate the memory of the run that the flags describe, with a micro-batch of the longest chains.

    Args:
        model: On tensors without memory (`device="meta"`).
        config: The settings.
        data: What the run reads.
        method: What --hypergradient means; None where no weights are learned.
        device: Where this process computes.
        precision: "fp32" or "bf16".
    """
    world = collectives.world_size()
    size = math.ceil(config.lower.batch_size / world)  # this process's part of a micro-batch
    chains = longest(model, data.train, size)
    batch = _batch(model, data.train, chains, config.lower.group_by_question, config.run.shard)
    meta_batch = None
    if data.meta:
        meta_batch = _batch(model, data.meta, longest(model, data.meta, size), True, config.run.shard)
    meta_batches = math.ceil(min(meta_batch_size(config.upper, data), len(data.meta)) / config.lower.batch_size)
    state_pass = 0
    if batch.states is not None:
        state_pass = _state_pass_bytes(model, longest(model, [*data.train, *data.meta], 1)[0])
    on_cpu = device.type == "cpu"  # where caches are in the device's memory
    scenario = MemoryScenario(
        optimizer=config.lower.optimizer,
        lower_loss=config.lower.lower_loss,
        precision=precision,
        hypergradient=method,
        steps=config.upper.unroll_steps,
        micro_batches=micro_batches_per_step(config, len(data.domains)),
        clipped=config.lower.max_grad_norm > 0,
        meta_batches=meta_batches,
        images=_image_bytes(model, [*data.train, *data.meta]) if on_cpu else 0,
        step_states=_state_bytes(batch.states, data) if on_cpu and batch.states is not None else 0,
        state_pass=state_pass,
        device=device.type,
        processes=world,
        sharded=config.run.shard,
    )
    return estimate(model, batch, meta_batch, scenario)


def _image_bytes(model: ProcessRewardModel, chains: Sequence[Chain]) -> int:
    """Bytes of the image cache once all images were seen, each as large as the largest of the longest chain."""
    with_image = {image: chain for chain in chains for image in chain.images}
    if not with_image:
        return 0
    (chain,) = longest(model, list(with_image.values()), 1)
    largest = max(image.nbytes for image in model.chain_tokenizer.encode(chain).images)
    return min(len(with_image) * largest, CACHE_BYTES)


def _state_bytes(states: Tensor, data: RunData) -> int:
    """Bytes of the step states of all chains; states: of some of them, [B, S, D]."""
    candidates = (chain for row in data.validation for chain in candidate_chains(row))
    distinct = {(chain.prompt, chain.steps) for chain in (*data.train, *data.meta, *candidates)}
    return min(sum(len(steps) for _, steps in distinct) * states[0, 0].nbytes, CACHE_BYTES)


def _state_pass_bytes(model: ProcessRewardModel, chain: Chain) -> int:
    """Bytes that computing the step states of a chain takes, its images' features being there."""
    states = cast(StepStates, model.step_states)
    known = [*model.parameters(), *model.buffers(), *_tensors(model.chain_tokenizer.encode(chain))]
    return forward_memory(lambda: states.compute(chain), known)


def longest(model: ProcessRewardModel, chains: Sequence[Chain], count: int) -> list[Chain]:
    """Find the chains with most tokens, among those with most images or text and an even sample of all.

    Returns:
        At most `count` chains, the longest first.
    """
    by_text = sorted(chains, key=lambda chain: sum(map(len, (chain.question, *chain.steps))))
    by_images = sorted(by_text, key=lambda chain: len(chain.images))  # a stable sort: by text among equals
    most = max(MOST_TEXT, count)
    sample = by_text[-most:] + by_images[-most:] + list(chains[:: -(-len(chains) // SAMPLED)])
    distinct = {id(chain): chain for chain in sample}.values()
    return sorted(distinct, key=lambda chain: -len(model.chain_tokenizer.encode(chain).input_ids))[:count]


def _batch(
    model: ProcessRewardModel, chains: Sequence[Chain], first: list[Chain], by_question: bool, sharded: bool
) -> Batch:
    """A micro-batch of the chains `first`; or, by question, of as many answers to the first one's question and then
    others, which share passes over prompts where the model can."""
    if model.step_states is not None:
        return model.make_batch(first)
    chosen = first
    if by_question:
        chosen = sorted(chains, key=lambda other: other.prompt != first[0].prompt)[: len(first)]
    share_prompts = by_question and model.shares_prompts and not sharded
    return collate([model.chain_tokenizer.encode(chain) for chain in chosen], share_prompts)


def weight_bytes(model: ProcessRewardModel) -> int:
    """Count the bytes of all parameters and buffers, those of a 4-bit base as they will be."""
    total = _bytes(model.parameters()) + _bytes(model.buffers())
    if not model.config.load_in_4bit:
        return total
    family = model.chain_tokenizer.family
    kept = tuple(f"{name}." for name in (*family.vision_modules, *family.projector_modules))
    layers = (module for name, module in model.base.named_modules() if not f"{name}.".startswith(kept))
    frozen = (layer.weight for layer in layers if isinstance(layer, nn.Linear) and not layer.weight.requires_grad)
    return total - sum(int(weight.numel() * (weight.element_size() - NF4)) for weight in frozen)


def _sharded_bytes(model: ProcessRewardModel, shards: int) -> tuple[int, int, int]:
    """Bytes on one process of a sharded model: its weights, its shard of a vector [P], and what is gathered for a
    moment, with gradients: the parameters outside of the layers, the layer that is computed and the next one."""
    decoder, layers = model.language_model_layers()
    unsharded = unsharded_parameters(model, decoder)
    inside = {param for layer in layers for param in layer.parameters()}
    sharded = [param for param in model.parameters() if param not in unsharded]
    weights = _bytes(unsharded) + _bytes(model.buffers()) + math.ceil(_bytes(sharded) / shards)
    outside, gathered = [param for param in sharded if param not in inside], 0
    for choose in (list, _trained):  # weights, then gradients
        largest = max(_bytes(choose(layer.parameters())) for layer in layers)
        gathered += _bytes(choose(outside)) + 2 * largest
    return weights, math.ceil(_bytes(_trained(sharded)) / shards), gathered


def _trained(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [param for param in params if param.requires_grad]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _lower_loss(model: ProcessRewardModel, batch: Batch, precision: str, lower_loss: str = "mse") -> Tensor:
    with autocast(torch.device("cpu"), precision):
        return mean_loss(STEP_LOSSES[lower_loss](model(batch), batch), batch)


def _upper_loss(model: ProcessRewardModel, batch: Batch, precision: str) -> Tensor:
    with autocast(torch.device("cpu"), precision):
        return aggregate(model(batch), batch.step_mask, "mean_logit").sigmoid().mean()


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a batch's fields."""
    if isinstance(value, Tensor):
        return [value]
    inner = vars(value) if is_dataclass(value) and not isinstance(value, Chain) else value
    inner = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list | tuple) else ()
    return [tensor for item in inner for tensor in _tensors(item)]


def _batch_bytes(batch: Batch) -> int:
    return _bytes(_tensors(batch))
