"""What `--hypergradient` means in a run, and whether the run can have it.

Where single chains are weighted or labels corrected, `auto` is the fastest method that is exact enough: in float32
`finite_difference`, which takes half of `jvp`'s time; in bfloat16, where rounding spoils differences, `jvp`, if the
model's kernels have a forward mode. Else it is `unrolled`, the most exact method, as long as the gradients that it
keeps take at most half of the device's free memory: the other half is for the optimizer's state, a step's gradient and
the activations. Beyond, it is as for single chains.
"""

from typing import Any

import torch
from torch import nn

from reweighting.bilevel.hypergradients import METHODS, make_hypergradient
from reweighting.bilevel.hypergradients.base import WindowSize
from reweighting.config.training import ModelConfig, TrainingConfig
from reweighting.distributed import collectives
from reweighting.errors import UserError
from reweighting.training.build import load_backbone, make_optimizer, micro_batches_per_step
from reweighting.training.free_memory import free_memory
from reweighting.training.memory_estimate import MemoryEstimate, estimate_run, weight_bytes
from reweighting.training.run_data import RunData

MAX_KEPT = 0.5  # of the free memory


def resolve_hypergradient(
    config: TrainingConfig,
    data: RunData,
    model: nn.Module,
    device: torch.device,
    precision: str,
    settings: dict[str, Any] | None = None,
) -> str | None:
    """Decide on the method of a run and print it with the reason; every process calls it.

    Args:
        config: The settings.
        data: What the run reads.
        model: The reward model, on the device.
        device: Where this process computes.
        precision: "fp32" or "bf16".
        settings: Those in the checkpoint that the run resumes from.

    Returns:
        A key of `METHODS`; None where no weights are learned.

    Raises:
        UserError: The flags rule the method out.
    """
    if not config.learns_weights:
        return None
    resumed = None if settings is None else resumed_method(settings)
    if config.upper.hypergradient == "auto" and resumed is not None:  # the window so far is of that method
        method, reason = resumed, "as when the run was started"
    else:  # rank 0 decides: each may have other memory
        choice = choose_method(config, data, model, free_memory(device), precision)
        method, reason = collectives.broadcast_object(choice)
    check_method(config, method)
    print(f"hypergradient: {method}: {reason}")
    return method


def resumed_method(settings: dict[str, Any]) -> str | None:
    """Return the method of the run that had these settings; None if it learned no weights."""
    method = settings.get("planned_hypergradient") or settings.get("hypergradient")
    return None if method == "auto" else method


def check_method(config: TrainingConfig, method: str) -> None:
    """Check a method (or `auto`) against the other flags.

    Raises:
        UserError: They rule it out.
    """
    if method not in METHODS:  # auto
        return
    needs = METHODS[method]
    if config.weighs_instances and not needs.weighs_chains:
        raise UserError(
            f"--hypergradient {method} finds no slope of a single chain, which --weights_for "
            f"{config.upper.weights_for} needs: use jvp, finite_difference or auto"
        )
    if config.corrects_labels and not needs.weighs_chains:
        raise UserError(
            f"--hypergradient {method} finds no slope of a single label, which --correct_labels "
            f"{config.upper.correct_labels} needs: use jvp, finite_difference or auto"
        )
    if needs.needs_forward_mode and not has_forward_mode(config.model):
        raise UserError(
            f"--hypergradient {method}: there is no forward mode through --attention flash_attention_2 or "
            "--load_in_4bit: use finite_difference, or --train head"
        )
    if needs.needs_full_parameters and config.run.shard:
        remedy = (
            "leave out --shard"
            if config.weighs_instances or config.corrects_labels
            else "use unrolled, or leave out --shard"
        )
        raise UserError(f"--hypergradient {method} cannot move sharded parameters: {remedy}")


def has_forward_mode(config: ModelConfig) -> bool:
    """Tell whether forward-mode differentiation can go through what is trained.

    It goes through plain arithmetic, to which sdpa falls back, but neither through flash attention's kernels nor
    through those for 4-bit weights. A head that is trained alone reads remembered states: its loss has neither.
    """
    return config.train == "head" or (config.attention in ("sdpa", "eager") and not config.load_in_4bit)


def choose_method(
    config: TrainingConfig, data: RunData, model: nn.Module, free: int, precision: str
) -> tuple[str, str]:
    """Decide what `--hypergradient` means.

    Args:
        config: The settings.
        data: What the run reads.
        model: The reward model, or one on shapes.
        free: Bytes of the device that are not taken, the model's weights being there already.
        precision: "fp32" or "bf16".

    Returns:
        The method, and the reason as text.
    """
    if config.upper.hypergradient != "auto":
        return config.upper.hypergradient, "as asked for"
    if config.weighs_instances or config.corrects_labels:
        reason = f"it finds a slope for each {'chain' if config.weighs_instances else 'label'}"
        return _without_kept_gradients(config.model, precision, reason)
    if config.run.shard:
        return "unrolled", "each process keeps its shard of the gradients"
    params = [param for param in model.parameters() if param.requires_grad]
    window = WindowSize(
        vector=sum(param.nbytes for param in params),
        steps=config.upper.unroll_steps,
        micro_batches=micro_batches_per_step(config, len(data.domains)),
        partial=collectives.world_size() > 1,
    )
    unrolled = make_hypergradient("unrolled", model, make_optimizer(config.lower, params))
    kept = unrolled.memory_bytes(window).kept
    reason = f"kept gradients take {_gigabytes(kept)} of {_gigabytes(free)} free memory"
    if kept <= MAX_KEPT * free:
        return "unrolled", reason
    return _without_kept_gradients(config.model, precision, reason)


def _without_kept_gradients(config: ModelConfig, precision: str, reason: str) -> tuple[str, str]:
    """The fastest method without kept gradients that is exact enough, and the reason, which begins as given."""
    if not has_forward_mode(config):
        return "finite_difference", f"{reason}; there is no forward mode through this model's kernels"
    if precision == "fp32":
        return "finite_difference", f"{reason}; in fp32 it is exact enough and faster than jvp"
    return "jvp", f"{reason}; in {precision} finite differences are rounded too much"


def estimate_memory(config: TrainingConfig, data: RunData, device: torch.device, precision: str) -> MemoryEstimate:
    """Estimate what the run will take on this process's device. No weight is read and no random number drawn.

    Args:
        config: The settings.
        data: What the run reads.
        device: Where this process computes.
        precision: "fp32" or "bf16".
    """
    with torch.random.fork_rng(devices=[]):
        model = load_backbone(config, torch.device("meta"), precision)
        method = None
        if config.learns_weights:
            method, _ = choose_method(config, data, model, free_memory(device) - weight_bytes(model), precision)
        return estimate_run(model, config, data, method, device, precision)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
