"""What a run's memory will be, by part, before any weight is loaded.

    model = ProcessRewardModel.from_backbone("backbone", device="meta")
    print(table(estimate(model, batch, meta_batch, Setting())))

The model is built from its config on tensors without memory, and one micro-batch of the longest chain goes through it
there, forward and backward (`live_memory.py`): activations are counted, not guessed. What the optimizer and the window
keep follows from the number P of trained parameters.

It counts tensors. A GPU has besides them what CUDA itself takes (about half a gigabyte) and what its allocator cannot
use (5 to 10 % is usual): `benchmarks/memory_check.py` compares with measured peaks, on the CPU.
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass

import torch
from torch import Tensor, nn

from reweighting.aggregation import aggregate
from reweighting.batches import Batch, collate
from reweighting.chains import Chain
from reweighting.devices import autocast
from reweighting.hypergradient import LARGE_PART, PARTS
from reweighting.live_memory import forward_memory, step_memory
from reweighting.reward_model import CACHE_BYTES, ProcessRewardModel

FLOAT = 4  # bytes of what is trained, and of all that belongs to it
SAMPLED = 64  # chains that are looked at for the longest, beside those with most text
MOST_TEXT = 8
NF4 = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes of a weight in 4 bits, with its share of doubly quantised scales


@dataclass(frozen=True)
class Setting:
    """What the estimate depends on beside the model and its batches.

    hypergradient: window, jvp, finite_difference, darts, sama, or None where no weights are learned. steps: of a
    window. accumulation: micro-batches in a step. meta_batches: batches in an update of the weights. images: bytes of
    the remembered ones, where these are in the device's memory.
    """

    optimizer: str = "adamw"
    precision: str = "bf16"
    hypergradient: str | None = "window"
    steps: int = 5
    accumulation: int = 1
    meta_batches: int = 1
    images: int = 0
    device: str = "cuda"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part. The first four are there throughout. A step's activations and gradients and the meta pass take
    turns, so `total`, the most at a time, is less than the sum.

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


def estimate(model: ProcessRewardModel, batch: Batch, meta_batch: Batch | None, setting: Setting) -> MemoryEstimate:
    """The memory of a run with this model, made on the device meta. batch, meta_batch: a micro-batch of each level
    with real tokens; meta_batch None where no weights are learned."""
    model.train()
    trained = [param for param in model.parameters() if param.requires_grad]
    one = FLOAT * sum(param.numel() for param in trained)  # a vector of all that is trained
    slots, adamw = setting.steps * setting.accumulation, setting.optimizer == "adamw"
    window = setting.hypergradient == "window"

    optimizer = one * (2 if adamw else 1) + (one if setting.hypergradient == "sama" else 0)
    kept = one * (slots + (2 if adamw else 0)) if window else 0
    if setting.hypergradient in ("jvp", "finite_difference"):
        kept = slots * _batch_bytes(batch)
    features = setting.images + _batch_bytes(batch)

    known = [*model.parameters(), *model.buffers(), *_tensors(batch)]
    saved, peak = step_memory(lambda: _lower_loss(model, batch, setting.precision), trained, known)
    total = one if setting.accumulation > 1 else 0  # the sum of a step's micro-batches, whose memory is kept
    # The newest gradient in pieces and as a vector, which the window may hold already; an earlier micro-batch's too.
    gradients = total + (one if window else 2 * one + total)
    step = max(total + peak + (0 if window else total), gradients)
    meta = 0 if meta_batch is None else _meta_pass(model, batch, meta_batch, setting, one, saved) + total
    there = weight_bytes(model) + optimizer + kept + features
    return MemoryEstimate(
        weight_bytes(model), optimizer, kept, features, saved, gradients, meta, there + max(step, meta)
    )


def _meta_pass(
    model: ProcessRewardModel, batch: Batch, meta_batch: Batch, setting: Setting, one: int, saved: int
) -> int:
    """The most that the upper level has at a time: the meta loss and its gradient, then the hypergradient."""
    trained = [param for param in model.parameters() if param.requires_grad]
    known = [*model.parameters(), *model.buffers(), *_tensors(meta_batch), *_tensors(batch)]
    meta_saved, meta_peak = step_memory(lambda: _upper_loss(model, meta_batch, setting.precision), trained, known)
    # The graphs of all its batches are there until the one backward pass.
    backward = setting.meta_batches * meta_saved + meta_peak - meta_saved + (one if setting.meta_batches > 1 else 0)
    if setting.hypergradient == "window":
        part = PARTS.get(setting.device, LARGE_PART)
        after = one + min(one, FLOAT * part) * (3 * setting.steps + 8)
    elif setting.hypergradient in ("darts", "sama"):
        after = 2 * one + saved
    else:
        forward = forward_memory(lambda: _lower_loss(model, batch, setting.precision), known)
        after = one + (2 * forward if setting.hypergradient == "jvp" else one + forward)
    return max(backward, 2 * one, after)


def estimate_run(
    model: ProcessRewardModel,
    args: Namespace,
    hypergradient: str | None,
    precision: str,
    accumulation: int,
    device: torch.device,
    train: Sequence[Chain],
    meta: Sequence[Chain],
) -> MemoryEstimate:
    """The memory of the run that the flags describe, on these chains; of the longest of them, as far as `longest` finds
    it, a whole micro-batch. model: made on the device meta. hypergradient: what --hypergradient means, None where no
    weights are learned. accumulation: micro-batches in a step."""
    chain = longest(model, train)
    batch = _batch(model, train, chain, args.batch_size, args.questions_together)
    meta_batch = _batch(model, meta, longest(model, meta), args.batch_size, True) if meta else None
    images = len({chain.image for chain in (*train, *meta)} - {None}) if device.type == "cpu" else 0
    pixels = model.chain_tokenizer.encode(chain).pixels
    setting = Setting(
        optimizer=args.optimizer,
        precision=precision,
        hypergradient=hypergradient,
        steps=args.unroll_steps,
        accumulation=accumulation,
        meta_batches=math.ceil(args.meta_batch_size / args.batch_size),
        images=0 if pixels is None else min(images * pixels.nbytes, CACHE_BYTES),
        device=device.type,
    )
    return estimate(model, batch, meta_batch, setting)


def longest(model: ProcessRewardModel, chains: Sequence[Chain]) -> Chain:
    """The chain with most tokens among those with most text and an even sample of all."""
    by_text = sorted(chains, key=lambda chain: sum(map(len, (chain.question, *chain.steps))))
    looked_at = by_text[-MOST_TEXT:] + list(chains[:: -(-len(chains) // SAMPLED)])
    return max(looked_at, key=lambda chain: len(model.chain_tokenizer.encode(chain).input_ids))


def _batch(model: ProcessRewardModel, chains: Sequence[Chain], chain: Chain, size: int, together: bool) -> Batch:
    """A micro-batch of one of the chains; with `together`, of the answers to its question and then others."""
    encode = model.chain_tokenizer.encode
    if together:
        in_order = sorted(chains, key=lambda other: other.prompt != chain.prompt)
        return model.collate([encode(other) for other in in_order[:size]])
    return collate([encode(chain)] * min(size, len(chains)))


def weight_bytes(model: ProcessRewardModel) -> int:
    """The bytes of all parameters and buffers, those of a 4-bit base as they will be."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if not model.config.base_4bit:
        return total
    layers = (module for name, module in model.named_modules() if "language_model" in name)
    frozen = (layer.weight for layer in layers if isinstance(layer, nn.Linear) and not layer.weight.requires_grad)
    return total - sum(int(weight.numel() * (weight.element_size() - NF4)) for weight in frozen)


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
    inner = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, tuple) else ()
    return [tensor for value in inner for tensor in _tensors(value)]


def _batch_bytes(batch: Batch) -> int:
    return sum(tensor.nbytes for tensor in _tensors(batch))
