"""Methods for the hypergradient, by the name that `--hypergradient` gives them.

    unrolled            keeps the gradient of every micro-batch of a window (`unrolled.py`)
    jvp                 keeps the micro-batches and differentiates their losses in forward mode (`directional.py`)
    finite_difference   the same by central differences, where the model's kernels have no forward mode
    darts               Betty's own, which looks at the last micro-batch only (`betty_native.py`)

All implement the protocol in `base.py`. A new method is a file here and a line in `METHODS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.optim import Optimizer

from reweighting.bilevel.hypergradients.base import Hypergradient
from reweighting.bilevel.hypergradients.betty_native import BettyNative
from reweighting.bilevel.hypergradients.derivatives import RADIUS, Derivative, central_differences, forward_mode
from reweighting.bilevel.hypergradients.directional import DirectionalHypergradient
from reweighting.bilevel.hypergradients.unrolled import UnrolledHypergradient
from reweighting.bilevel.label_correction import StepLabels
from reweighting.bilevel.losses import LossFunction, StepLoss, loss_at_parameters, squared_error
from reweighting.distributed.sharding import Replicated


@dataclass(frozen=True)
class LowerLevel:
    """What a method may use of the lower level.

    Attributes:
        optimizer: Over the trained parameters.
        layout: How these lie on the processes.
        loss: What each of this process's chains adds to a micro-batch's unweighted loss at given parameters, without
            dropout.
        precision: Of the compute, "fp32" or "bf16".
        by_chain: Whether each chain has a weight of its own; else each domain has one.
        labels: Those that are corrected, if any are.
    """

    optimizer: Optimizer
    layout: Replicated
    loss: LossFunction
    precision: str
    by_chain: bool
    labels: StepLabels | None


@dataclass(frozen=True)
class Method:
    """How a method is made, and what it needs.

    Attributes:
        make: Makes it for a lower level.
        needs_full_parameters: Whether it moves the parameters, which then cannot be sharded.
        needs_forward_mode: Whether the model's kernels must have a forward mode.
        weighs_chains: Whether each chain can have a weight of its own, and each label be corrected.
    """

    make: Callable[[LowerLevel], Hypergradient]
    needs_full_parameters: bool = False
    needs_forward_mode: bool = False
    weighs_chains: bool = False


def _unrolled(lower: LowerLevel) -> Hypergradient:
    return UnrolledHypergradient(lower.optimizer, lower.layout)


def _directional(lower: LowerLevel, derivative: Derivative) -> Hypergradient:
    params = lower.layout.trainable_parameters()
    return DirectionalHypergradient(lower.optimizer, params, lower.loss, derivative, lower.by_chain, lower.labels)


def _finite_difference(lower: LowerLevel) -> Hypergradient:
    return _directional(lower, partial(central_differences, radius=RADIUS[lower.precision]))


def _darts(lower: LowerLevel) -> Hypergradient:
    return BettyNative(lower.layout.trainable_parameters(), lower.loss)


METHODS = {
    "unrolled": Method(_unrolled),
    "jvp": Method(
        partial(_directional, derivative=forward_mode),
        needs_full_parameters=True,
        needs_forward_mode=True,
        weighs_chains=True,
    ),
    "finite_difference": Method(_finite_difference, needs_full_parameters=True, weighs_chains=True),
    "darts": Method(_darts, needs_full_parameters=True),
}


def make_hypergradient(
    method: str,
    module: nn.Module,
    optimizer: Optimizer,
    *,
    layout: Replicated | None = None,
    precision: str = "fp32",
    step_loss: StepLoss = squared_error,
    by_chain: bool = False,
    labels: StepLabels | None = None,
) -> Hypergradient:
    """Make a method for a lower level.

    Args:
        method: A key of `METHODS`.
        module: The reward model.
        optimizer: Over its trained parameters, one group.
        layout: How the parameters lie on the processes; by default each holds all of them.
        precision: Of the compute, "fp32" or "bf16".
        step_loss: The lower level's, of `losses.STEP_LOSSES`.
        by_chain: Whether each chain has a weight of its own; else each domain has one. The method must weigh chains.
        labels: Those that are corrected, if any are. The method must weigh chains.

    Returns:
        The method, at the beginning of a window.
    """
    layout = layout or Replicated(module)
    loss = loss_at_parameters(module, precision, step_loss, labels)
    return METHODS[method].make(LowerLevel(optimizer, layout, loss, precision, by_chain, labels))
