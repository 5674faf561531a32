"""Keeps the micro-batches of a window instead of their gradients: for models whose gradients do not fit into memory.

The products < u_n , g_nk > are found at the end of the window as directional derivatives: a micro-batch's loss is
differentiated along u_n, in forward mode or by two more forward passes (`derivatives.py`). Nothing of the size of the
parameters is kept during the window. That takes three approximations:

- The losses are differentiated at the window's last parameters, not at those that the step had: an error of second
  order in the learning rate, like the term that every method leaves out.
- All u_n lie along one direction, u_n = c_n d. For SGD that is exact: d = v, and the numbers c_n follow from learning
  rates, momentum and weight decay. For AdamW, d = v / (root of the second moment at the window's end + eps): the
  second moment is taken as constant during the window. With beta2 = 0.999 that holds once AdamW has made some hundred
  steps, and fails in its first twenty, where the moment's changes cancel most of a step's effect.
- Dropout is off.

`tests/bilevel/test_directional.py` compares with autograd through the unrolled optimizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from reweighting.bilevel.hypergradients.base import (
    FetchBatch,
    Hypergradient,
    WindowMemory,
    WindowSize,
    steps_in_state,
    sum_by_domain,
    through_clipping,
)
from reweighting.bilevel.hypergradients.derivatives import Derivative
from reweighting.bilevel.hypergradients.optimizer_adjoint import adamw_adjoint, check_optimizer, sgd_adjoint
from reweighting.bilevel.losses import LossFunction
from reweighting.distributed import collectives
from reweighting.distributed.flat_vectors import unflatten
from reweighting.modeling.collate import Batch

MicroBatch = tuple[int, int, Batch]  # (number of the micro-step, domain, batch)


@dataclass
class DirectionalStep:
    """What one optimizer step leaves behind.

    Attributes:
        micro_batches: The step's micro-batches.
        clip_factor: What clipping multiplied their gradient with, at most 1.
        learning_rate: The step's learning rate.
        along: The derivative of each micro-batch's loss along the step's gradient [M]; None if it was not clipped.
    """

    micro_batches: list[MicroBatch]
    clip_factor: float
    learning_rate: float
    along: Tensor | None


class DirectionalHypergradient(Hypergradient):
    """The micro-batches of the window, whose losses are differentiated at its end.

    Args:
        optimizer: The lower level's, SGD or AdamW over `params` in their order, see `check_optimizer`.
        params: {name: trained parameter}.
        loss: The unweighted loss of this process's part of a micro-batch at given parameters, without dropout.
        derivative: `forward_mode` or `central_differences`.

    Raises:
        ValueError: The optimizer is another one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        params: Mapping[str, Tensor],
        loss: LossFunction,
        derivative: Derivative,
    ):
        check_optimizer(optimizer)
        self.optimizer, self.params, self.loss, self.derivative = optimizer, params, loss, derivative
        self.steps: list[DirectionalStep] = []
        self._pending: list[MicroBatch] = []

    def add_micro_batch(self, micro_step: int, domain: int, batch: Batch, gradient: Sequence[Tensor]) -> None:
        """Keep the micro-batch."""
        self._pending.append((micro_step, domain, batch))

    def close_step(self, gradient: Tensor, clip_factor: float, learning_rate: float) -> None:
        """Keep the step's scalars; if it was clipped, differentiate along its gradient while that is there."""
        along = self._slopes(self._pending, gradient) if clip_factor < 1.0 else None
        self.steps.append(DirectionalStep(self._pending, clip_factor, learning_rate, along))
        self._pending = []

    def drop_step(self) -> None:
        """Forget the micro-batches of a step that is not made."""
        self._pending = []

    def _slopes(self, micro_batches: list[MicroBatch], direction: Tensor) -> Tensor:
        """The derivative of each whole micro-batch's loss along a direction [P], at the parameters as they are now."""
        batches = [batch for *_, batch in micro_batches]
        return collectives.all_reduce_sum(self.derivative(self.loss, self.params, batches, direction))

    def state(self) -> dict:
        """Return the numbers of the window's micro-steps and the steps' scalars; the same in every process."""
        steps = []
        for step in self.steps:
            numbers = [number for number, *_ in step.micro_batches]
            scalars = {"clip": step.clip_factor, "lr": step.learning_rate, "along": step.along}
            steps.append({"numbers": numbers, **scalars})
        return {"replayed": steps}

    def load(self, state: dict, fetch_batch: FetchBatch) -> None:
        """Continue the window of a state; its batches are fetched again."""
        self.steps, self._pending = [], []
        device = self.optimizer.param_groups[0]["params"][0].device
        for saved in steps_in_state(state, "replayed"):
            along = None if saved["along"] is None else saved["along"].to(device)
            micro_batches = [(number, *fetch_batch(number)) for number in saved["numbers"]]
            self.steps.append(DirectionalStep(micro_batches, saved["clip"], saved["lr"], along))

    @torch.no_grad()
    def compute(self, v: Tensor, weights: Tensor) -> Tensor:
        """Return dL_meta / dw [K] from derivatives along `v`, which is overwritten, and begin the next window."""
        steps, self.steps = self.steps, []
        if not steps:  # every step was left out
            return v.new_zeros(len(weights))
        micro_batches = [micro_batch for step in steps for micro_batch in step.micro_batches]
        domains = [domain for _, domain, _ in micro_batches]
        factors = self._factors([step.learning_rate for step in steps])
        slopes = self._slopes(micro_batches, self.direction(v))
        counts = [len(step.micro_batches) for step in steps]
        weight_of = weights.detach()[torch.tensor(domains, device=weights.device)].to(slopes)  # of each micro-batch
        products = []
        for step, factor, slope, w in zip(steps, factors, slopes.split(counts), weight_of.split(counts), strict=True):
            product = factor / len(slope) * (w * slope)  # g_nk is a gradient divided by M
            if step.along is not None:
                product = through_clipping(product, w * step.along, step.clip_factor)
            products.append(product)
        return sum_by_domain(torch.cat(products), domains, weights)

    def direction(self, v: Tensor) -> Tensor:
        """Return the direction d [P] that all u_n lie along, from the meta gradient v [P], in its place."""
        if not isinstance(self.optimizer, AdamW):
            return v
        group = self.optimizer.param_groups[0]
        for param, piece in zip(self.params.values(), unflatten(v, list(self.params.values())), strict=True):
            state = self.optimizer.state[param]
            root = (state["exp_avg_sq"] / (1 - group["betas"][1] ** int(state["step"]))).sqrt_()
            # Where there never was a gradient, the window's batches have none: moving there would change nothing.
            piece.div_(root + group["eps"]).masked_fill_(root == 0, 0)
        return v

    def _factors(self, learning_rates: list[float]) -> list[float]:
        """c_n of each step, oldest first: the optimizer's adjoint of a single parameter with d = 1."""
        group, one = self.optimizer.param_groups[0], torch.ones((), dtype=torch.float64)
        if isinstance(self.optimizer, AdamW):
            newest = int(self.optimizer.state[group["params"][0]]["step"])
            adjoint = adamw_adjoint(one, group, learning_rates, newest)
        else:
            adjoint = sgd_adjoint(one, group, learning_rates)
        return [factor.item() for factor in adjoint][::-1]

    def memory_bytes(self, window: WindowSize) -> WindowMemory:
        """Return what the kept micro-batches take, and one moved copy of the parameters or of their tangents."""
        return WindowMemory(window.steps * window.micro_batches * window.batch, window.vector)
