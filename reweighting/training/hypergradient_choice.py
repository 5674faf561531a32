"""Which way to the hypergradient a run takes, and what memory it will take in all.

    window              keeps a gradient [P] for each micro-batch of a window: P trained parameters in float32
    jvp                 keeps the micro-batches and finds slopes in forward mode (`directional.py`)
    finite_difference   the same from two forward passes, where the model's kernels have no forward mode

`--hypergradient auto` is the most exact of these that the device's memory allows.
"""

from collections.abc import Callable

import torch

from reweighting.bilevel.problems import DIRECTIONAL_METHODS
from reweighting.config.training import TrainingConfig
from reweighting.distributed import collectives
from reweighting.errors import UserError
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.training.build import load_backbone, micro_batches_per_step
from reweighting.training.free_memory import free_memory
from reweighting.training.memory_estimate import FLOAT, MemoryEstimate, MemoryScenario, estimate_run, weight_bytes
from reweighting.training.run_data import RunData

SPARE = 0.9  # of the free memory may be planned for
PLENTY = 0.25  # of it: where the kept gradients take no more, nothing needs to be estimated


def resolve_hypergradient(
    config: TrainingConfig,
    data: RunData,
    model: ProcessRewardModel,
    device: torch.device,
    precision: str,
    settings: dict | None = None,
) -> str | None:
    """Resolve --hypergradient, and print the choice with its reason; every process calls it.

    Args:
        config: the settings.
        data: what the run reads.
        model: the reward model.
        device: where this process computes.
        precision: "fp32" or "bf16".
        settings: those of the checkpoint that the run resumes from; None at a start.

    Returns:
        The method's name; None where no weights are learned.

    Raises:
        UserError: if the method cannot be used with the flags in so many processes.
    """
    if not config.learns_weights:
        return None
    so_far = None if settings is None else resumed_method(settings)
    if config.upper.hypergradient == "auto" and so_far is not None:  # the window so far is of that kind
        way, reason = so_far, "as when the run was started"
    else:
        choice = choose_hypergradient(config, data, model, device, precision, free_memory(device))
        way, reason = collectives.broadcast_object(choice)  # each may have other memory
    check_method(config, way)
    print(f"hypergradient: {way}: {reason}")
    return way


def resumed_method(settings: dict) -> str | None:
    """What --hypergradient meant in the run with these settings; None if it learned no weights."""
    way = settings.get("planned_hypergradient") or settings.get("hypergradient")
    return None if way == "auto" else way


def check_method(config: TrainingConfig, hypergradient: str) -> None:
    """Raise UserError if this way to the hypergradient cannot be had with the flags in so many processes."""
    if hypergradient == "jvp" and not has_forward_mode(config.model.attention, config.model.load_in_4bit):
        raise UserError("--hypergradient jvp: there is no forward mode through --attention flash_attention_2 or "
                        "--load_in_4bit: use finite_difference")  # fmt: skip
    if config.run.shard and hypergradient in DIRECTIONAL_METHODS:
        raise UserError(f"--hypergradient {hypergradient} cannot move parameters that are cut into parts: use "
                        "unrolled, or leave out --shard")  # fmt: skip
    if collectives.world_size() > 1 and hypergradient in ("darts", "sama"):
        raise UserError(f"--hypergradient {hypergradient}: Betty's own work in one process only: use unrolled")


def choose_hypergradient(
    config: TrainingConfig, data: RunData, model: ProcessRewardModel, device: torch.device, precision: str, free: int
) -> tuple[str, str]:
    """What --hypergradient means, with so many bytes `free` beside the model, and why."""
    if config.upper.hypergradient != "auto":
        return config.upper.hypergradient, "as asked for"
    if config.run.shard:
        return "unrolled", "each process keeps its part of the gradients"
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    accumulation = micro_batches_per_step(config, len(data.domains))
    window = MemoryScenario(
        optimizer=config.lower.optimizer,
        steps=config.upper.unroll_steps,
        accumulation=accumulation,
        processes=collectives.world_size(),
    )
    return plan_hypergradient(
        trained, window, free, has_forward_mode(config.model.attention, config.model.load_in_4bit),
        lambda: estimate_memory(config, data, device, precision, "jvp"),
    )  # fmt: skip


def estimate_memory(
    config: TrainingConfig, data: RunData, device: torch.device, precision: str, hypergradient: str | None = None
) -> MemoryEstimate:
    """What the run will take on the device, by this process. No weight is read and no random number drawn.
    hypergradient: in place of what --hypergradient means."""
    accumulation = micro_batches_per_step(config, len(data.domains))
    with torch.random.fork_rng(devices=[]):
        model = load_backbone(config, torch.device("meta"), precision)
        if hypergradient is None and data.meta:
            free = free_memory(device) - weight_bytes(model)
            hypergradient, _ = choose_hypergradient(config, data, model, device, precision, free)
        return estimate_run(model, config, hypergradient, precision, accumulation, device, data.train, data.meta)


def has_forward_mode(attention: str, load_in_4bit: bool) -> bool:
    """Whether forward-mode differentiation can go through a model: through plain arithmetic, to which sdpa falls back,
    but neither through flash attention's kernels nor through those for 4-bit weights."""
    return attention in ("sdpa", "eager") and not load_in_4bit


def plan_hypergradient(
    trained: int,
    window: MemoryScenario,
    free: int,
    forward_mode: bool,
    rest: Callable[[], MemoryEstimate],
) -> tuple[str, str]:
    """The way and the reason, in words.

    trained: parameters. window: what its length follows from. free: bytes of the device that are not taken, the weights
    being there already. forward_mode: whether there is one. rest: gives the estimate of the run without kept
    gradients; asked for only where it may matter.
    """
    kept = FLOAT * trained * window.window_vectors
    words = f"{window.window_gradients} kept gradients take {_amount(kept)} of {_amount(free)} that are free"
    if kept <= PLENTY * free:
        return "unrolled", words
    estimate = rest()
    others = estimate.total - estimate.weights
    words += f", and the rest of the run {_amount(others)}"
    if kept + others <= SPARE * free:
        return "unrolled", words
    if forward_mode:
        return "jvp", words
    return "finite_difference", f"{words}; there is no forward mode through this model's kernels"


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
