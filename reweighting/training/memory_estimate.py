"""What a run's memory will be, by part, before any weight is loaded.

    model = ProcessRewardModel.from_backbone("backbone", device="meta")
    print(table(estimate(model, batch, meta_batch, MemoryScenario())))

The model is built from its config on tensors without memory, and one micro-batch of the longest chain goes through it
there, forward and backward (`fake_tensor_memory.py`): activations are counted, not guessed. What the optimizer and the
window keep follows from the number P of trained parameters.

It counts tensors. A GPU has besides them what CUDA itself takes (about half a gigabyte) and what its allocator cannot
use (5 to 10 % is usual): `benchmarks/memory_check.py` compares with measured peaks, on the CPU.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass

import torch
from torch import Tensor, nn

from reweighting.bilevel.hypergradients.unrolled import LARGE_PART, PARTS
from reweighting.config.training import TrainingConfig
from reweighting.data.chains import Chain
from reweighting.devices import autocast
from reweighting.distributed import collectives
from reweighting.distributed.sharding import uncut_parameters
from reweighting.modeling.aggregation import aggregate
from reweighting.modeling.collate import Batch, collate
from reweighting.modeling.reward_model import CACHE_BYTES, ProcessRewardModel
from reweighting.training.fake_tensor_memory import forward_memory, step_memory

FLOAT = 4  # bytes of what is trained, and of all that belongs to it
SAMPLED = 64  # chains that are looked at for the longest ones, beside those with most text
MOST_TEXT = 8
NF4 = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes of a weight in 4 bits, with its share of doubly quantised scales


@dataclass(frozen=True)
class MemoryScenario:
    """What the estimate depends on beside the model and its batches.

    hypergradient: window, jvp, finite_difference, darts, sama, or None where no weights are learned. steps: of a
    window. accumulation: micro-batches in a step. clipped: whether steps are. meta_batches: batches in an update of the
    weights. images: bytes of the remembered ones, where these are in the device's memory. processes: that make the run;
    sharded: each holds a part of the parameters, as `sharding.Sharded` cuts them.
    """

    optimizer: str = "adamw"
    precision: str = "bf16"
    hypergradient: str | None = "unrolled"
    steps: int = 5
    accumulation: int = 1
    clipped: bool = False
    meta_batches: int = 1
    images: int = 0
    device: str = "cuda"
    processes: int = 1
    sharded: bool = False

    @property
    def window_gradients(self) -> int:
        """How many gradients [P] a window keeps: each micro-batch's, and each step's where that is a sum over
        processes."""
        return self.steps * (self.accumulation + (self.processes > 1 and not self.sharded))

    @property
    def window_vectors(self) -> int:
        """How many vectors [P] a window keeps: gradients, and the moments before it."""
        return self.window_gradients + (2 if self.optimizer == "adamw" else 0)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part, on one process. The first four are there throughout. A step's activations and gradients and the
    meta pass take turns, so `total`, the most at a time, is mostly less than the sum.

    gradients: all copies of a step's gradient that are there at once, without the kept ones. meta_pass: activations and
    gradients of the meta loss, or what the hypergradient then takes, whichever is more.
    """

    weights: int
    optimizer: int
    kept_gradients: int
    image_features: int
    activations: int
    gradients: int
    meta_pass: int
    total: int


def table(estimate: MemoryEstimate) -> str:
    """The parts as lines of text."""
    words = {name: name.replace("_", " ") for name in vars(estimate)} | {"total": "most at a time"}
    return "\n".join(f"  {words[name]:<16}{count / 1e9:9.3f} GB" for name, count in vars(estimate).items())


def estimate(
    model: ProcessRewardModel, batch: Batch, meta_batch: Batch | None, setting: MemoryScenario
) -> MemoryEstimate:
    """The memory of a run with this model, made on the device meta. batch, meta_batch: one process's part of a
    micro-batch of each level, with real tokens; meta_batch None where no weights are learned."""
    model.train()
    weights, one, gathered, parts = weight_bytes(model), _bytes(model.parameters(), trained=True), 0, 1
    if setting.sharded:
        parts = setting.processes
        weights, one, gathered = _cut(model, parts)
    window = setting.hypergradient == "unrolled"

    optimizer = one * (2 if setting.optimizer == "adamw" else 1) + (one if setting.hypergradient == "sama" else 0)
    kept = one * setting.window_vectors if window else 0
    if setting.hypergradient in ("jvp", "finite_difference"):
        kept = setting.steps * setting.accumulation * _batch_bytes(batch)
    features = setting.images + _batch_bytes(batch)

    known = [*model.parameters(), *model.buffers(), *_tensors([batch, meta_batch])]
    saved, peak = _pass(model, known, lambda: _lower_loss(model, batch, setting.precision), parts, gathered)
    total = one if setting.accumulation > 1 else 0  # the sum of a step's micro-batches, whose memory is kept
    # The newest gradient in pieces and as a vector, which the window may hold already; an earlier micro-batch's too.
    gradients = total + (one if window else 2 * one + total)
    step = max(total + peak + (0 if window else total), gradients)
    meta = 0
    if meta_batch is not None:
        upper = _pass(model, known, lambda: _upper_loss(model, meta_batch, setting.precision), parts, gathered)
        # The graphs of all its batches are there until the one backward pass.
        backward = upper[1] + (setting.meta_batches - 1) * upper[0] + (one if setting.meta_batches > 1 else 0)
        meta = max(backward, 2 * one, one + _hypergradient_bytes(model, batch, known, setting, one, saved)) + total
    there = weights + optimizer + kept + features
    return MemoryEstimate(weights, optimizer, kept, features, saved, gradients, meta, there + max(step, meta))


def _pass(
    model: ProcessRewardModel, known: list[Tensor], loss: Callable[[], Tensor], parts: int, gathered: int
) -> tuple[int, int]:
    """Bytes that the forward pass of a loss leaves behind, and the most that it and its backward pass have at a time.

    known: tensors that are there anyway. parts: that parameters are cut into; gathered: see `_cut`.
    """
    trained = [param for param in model.parameters() if param.requires_grad]
    saved, peak = step_memory(loss, trained, known, parts)
    return saved, peak + gathered


def _hypergradient_bytes(
    model: ProcessRewardModel, batch: Batch, known: list[Tensor], setting: MemoryScenario, one: int, saved: int
) -> int:
    """What the hypergradient takes beside the meta gradient. saved: bytes that a forward pass leaves behind."""
    if setting.hypergradient == "unrolled":
        workers = torch.get_num_threads() if setting.device == "cpu" else 1  # each at a part
        part = min(one, FLOAT * PARTS.get(setting.device, LARGE_PART) * workers)
        return max(part * (3 * setting.steps + 8), one if setting.clipped else 0)
    if setting.hypergradient in ("darts", "sama"):
        return one + saved
    forward = forward_memory(lambda: _lower_loss(model, batch, setting.precision), known)
    return 2 * forward if setting.hypergradient == "jvp" else one + forward


def estimate_run(
    model: ProcessRewardModel,
    config: TrainingConfig,
    hypergradient: str | None,
    precision: str,
    accumulation: int,
    device: torch.device,
    train: Sequence[Chain],
    meta: Sequence[Chain],
) -> MemoryEstimate:
    """The memory of the run that the flags describe, on these chains; of the longest of them, as far as `longest` finds
    them, a whole micro-batch (which --group_by_question may make a little larger).

    model: made on the device meta. hypergradient: what --hypergradient means, None where no weights are learned.
    accumulation: micro-batches in a step.
    """
    world = collectives.world_size()
    size = math.ceil(config.lower.batch_size / world)  # this process's part of a micro-batch
    chains = longest(model, train, size)
    chains = (chains * size)[:size]  # as chains are drawn again where there are few
    batch = _batch(model, train, chains, config.lower.group_by_question, config.run.shard)
    meta_batch = _batch(model, meta, longest(model, meta, size), True, config.run.shard) if meta else None
    setting = MemoryScenario(
        optimizer=config.lower.optimizer,
        precision=precision,
        hypergradient=hypergradient,
        steps=config.upper.unroll_steps,
        accumulation=accumulation,
        clipped=config.lower.max_grad_norm > 0,
        meta_batches=math.ceil(min(config.upper.meta_batch_size, len(meta)) / config.lower.batch_size),
        images=_image_bytes(model, [*train, *meta]) if device.type == "cpu" else 0,
        device=device.type,
        processes=world,
        sharded=config.run.shard,
    )
    return estimate(model, batch, meta_batch, setting)


def _image_bytes(model: ProcessRewardModel, chains: Sequence[Chain]) -> int:
    """What is remembered of the chains' images once all were seen, each as large as that of the longest chain."""
    with_image = {chain.image: chain for chain in chains if chain.image is not None}
    if not with_image:
        return 0
    (chain,) = longest(model, list(with_image.values()), 1)
    pixels = model.chain_tokenizer.encode(chain).pixels
    return min(len(with_image) * pixels.nbytes, CACHE_BYTES) if pixels else 0


def longest(model: ProcessRewardModel, chains: Sequence[Chain], count: int) -> list[Chain]:
    """So many chains with most tokens, the longest first, among those with most text and an even sample of all."""
    by_text = sorted(chains, key=lambda chain: sum(map(len, (chain.question, *chain.steps))))
    looked_at = by_text[-max(MOST_TEXT, count) :] + list(chains[:: -(-len(chains) // SAMPLED)])
    distinct = {id(chain): chain for chain in looked_at}.values()
    return sorted(distinct, key=lambda chain: -len(model.chain_tokenizer.encode(chain).input_ids))[:count]


def _batch(
    model: ProcessRewardModel, chains: Sequence[Chain], first: list[Chain], together: bool, sharded: bool
) -> Batch:
    """A micro-batch of these first chains; with `together`, of as many answers to the first one's question and then
    others, which share passes over prompts where the model can."""
    chosen = first
    if together:
        chosen = sorted(chains, key=lambda other: other.prompt != first[0].prompt)[: len(first)]
    share = together and model.shares_prompts and not sharded
    return collate([model.chain_tokenizer.encode(chain) for chain in chosen], share)


def weight_bytes(model: ProcessRewardModel) -> int:
    """The bytes of all parameters and buffers, those of a 4-bit base as they will be."""
    total = _bytes(model.parameters()) + _bytes(model.buffers())
    if not model.config.load_in_4bit:
        return total
    family = model.chain_tokenizer.family
    kept = tuple(f"{name}." for name in (*family.vision_modules, *family.projector_modules))
    layers = (module for name, module in model.base.named_modules() if not f"{name}.".startswith(kept))
    frozen = (layer.weight for layer in layers if isinstance(layer, nn.Linear) and not layer.weight.requires_grad)
    return total - sum(int(weight.numel() * (weight.element_size() - NF4)) for weight in frozen)


def _cut(model: ProcessRewardModel, parts: int) -> tuple[int, int, int]:
    """Of a model that is cut into parts: bytes of the weights and of the trained ones on one process, and of what is
    gathered there for a moment: what belongs to no layer, the layer that is computed and the next one, with their
    gradients."""
    decoder, layers = model.language_model_layers()
    uncut = uncut_parameters(model, decoder)
    inside = {param for layer in layers for param in layer.parameters()}
    cut = [param for param in model.parameters() if param not in uncut]
    weights = _bytes(uncut) + _bytes(model.buffers()) + math.ceil(_bytes(cut) / parts)
    outside, gathered = [param for param in cut if param not in inside], 0
    for trained in (False, True):  # weights, gradients
        largest = max(_bytes(layer.parameters(), trained) for layer in layers)
        gathered += _bytes(outside, trained) + 2 * largest
    return weights, math.ceil(_bytes(cut, trained=True) / parts), gathered


def _bytes(tensors: Iterable[Tensor], trained: bool = False) -> int:
    """The bytes of tensors, or of those among them that are trained."""
    return sum(tensor.nbytes for tensor in tensors if tensor.requires_grad or not trained)


def _lower_loss(model: ProcessRewardModel, batch: Batch, precision: str) -> Tensor:
    with autocast(torch.device("cpu"), precision):
        errors = (model(batch).sigmoid() - batch.targets).square()
        return (errors * batch.target_mask).sum()  # how many are chosen by a mask is not known without numbers


def _upper_loss(model: ProcessRewardModel, batch: Batch, precision: str) -> Tensor:
    with autocast(torch.device("cpu"), precision):
        return aggregate(model(batch), batch.step_mask, "mean_logit").sigmoid().mean()


def _tensors(batch) -> list[Tensor]:
    """All tensors in a batch's fields."""
    if isinstance(batch, Tensor):
        return [batch]
    inner = vars(batch) if is_dataclass(batch) and not isinstance(batch, Chain) else batch
    inner = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list | tuple) else ()
    return [tensor for value in inner for tensor in _tensors(value)]


def _batch_bytes(batch: Batch) -> int:
    return sum(tensor.nbytes for tensor in _tensors(batch))
