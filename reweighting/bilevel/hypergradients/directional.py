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
    through_clipping,
)
from reweighting.bilevel.hypergradients.derivatives import Derivative
from reweighting.bilevel.hypergradients.optimizer_adjoint import adamw_adjoint, check_optimizer, sgd_adjoint
from reweighting.bilevel.losses import LossFunction
from reweighting.distributed import collectives
from reweighting.distributed.flat_vectors import unflatten
from reweighting.modeling.collate import Batch

MicroBatch = tuple[int, int, Batch]  # (number of the micro-step, domain, batch)
# Of a micro-batch, in all processes together: (indices of the weights that its loss is multiplied with [n], derivative
# of what each of them multiplies [n]). One weight for each domain: n = 1. One for each chain: n chains.
Slopes = tuple[Tensor, Tensor]


@dataclass
class DirectionalStep:
    """What one optimizer step leaves behind.

    Attributes:
        micro_batches: The step's micro-batches.
        clip_factor: What clipping multiplied their gradient with, at most 1.
        learning_rate: The step's learning rate.
        along: The slopes along the step's gradient, see `Slopes`; None if it was not clipped.
    """

    micro_batches: list[MicroBatch]
    clip_factor: float
    learning_rate: float
    along: list[Slopes] | None


class DirectionalHypergradient(Hypergradient):
    """The micro-batches of the window, whose losses are differentiated at its end.

    Args:
        optimizer: The lower level's, SGD or AdamW over `params` in their order, see `check_optimizer`.
        params: {name: trained parameter}.
        loss: What each of this process's chains adds to a micro-batch's unweighted loss at given parameters, without
            dropout.
        derivative: `forward_mode` or `central_differences`.
        by_chain: Whether each chain has a weight of its own; else each domain has one.

    Raises:
        ValueError: The optimizer is another one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        params: Mapping[str, Tensor],
        loss: LossFunction,
        derivative: Derivative,
        by_chain: bool = False,
    ):
        check_optimizer(optimizer)
        self.optimizer, self.params, self.loss, self.derivative = optimizer, params, loss, derivative
        self.by_chain = by_chain
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

    def _slopes(self, micro_batches: list[MicroBatch], direction: Tensor) -> list[Slopes]:
        """The slopes of each micro-batch along a direction [P], at the parameters as they are now; on the CPU."""
        batches = [batch for *_, batch in micro_batches]
        parts = self.derivative(self.loss, self.params, batches, direction)  # [B] each
        if self.by_chain:
            own = [(batch.chain_ids, part.cpu()) for batch, part in zip(batches, parts, strict=True)]
            gathered = zip(*collectives.all_gather_object(own), strict=True)  # for each micro-batch, of all processes
            return [(torch.cat([ids for ids, _ in one]), torch.cat([slope for _, slope in one])) for one in gathered]
        sums = collectives.all_reduce_sum(torch.stack([part.sum() for part in parts])).cpu()  # [micro-batches]
        domains = torch.tensor([domain for _, domain, _ in micro_batches])
        return list(zip(domains.split(1), sums.split(1), strict=True))

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
        for saved in steps_in_state(state, "replayed"):
            micro_batches = [(number, *fetch_batch(number)) for number in saved["numbers"]]
            self.steps.append(DirectionalStep(micro_batches, saved["clip"], saved["lr"], saved["along"]))

    @torch.no_grad()
    def compute(self, v: Tensor, weights: Tensor) -> Tensor:
        """Return dL_meta / dw from derivatives along `v`, which is overwritten, and begin the next window.

        Args:
            v: dL_meta / dphi_N [P].
            weights: That held in the window: of the domains [K], or of the chains [C].

        Returns:
            dL_meta / dw, shaped like `weights`; 0 for a chain that the window has not met.
        """
        steps, self.steps = self.steps, []
        total = torch.zeros(len(weights), dtype=torch.float64)
        if self.by_chain:
            self.times_met = torch.zeros(len(weights), dtype=torch.int64)
        if not steps:  # every step was left out
            return total.to(weights)
        micro_batches = [micro_batch for step in steps for micro_batch in step.micro_batches]
        slopes = iter(self._slopes(micro_batches, self.direction(v)))
        weights = weights.detach()
        on_cpu = weights.cpu()
        for step, factor in zip(steps, self._factors([step.learning_rate for step in steps]), strict=True):
            indices, products = _concatenated([next(slopes) for _ in step.micro_batches])  # [n] each
            products = factor / len(step.micro_batches) * products  # g_nk is a gradient divided by M
            if step.along is not None:
                _, along = _concatenated(step.along)
                products = through_clipping(products, along, step.clip_factor, on_cpu[indices])
            total.index_add_(0, indices, products.double())  # on the CPU: in a fixed order
            if self.times_met is not None:
                self.times_met += torch.bincount(indices, minlength=len(weights))
        return total.to(weights)

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


def _concatenated(slopes: list[Slopes]) -> Slopes:
    """The slopes of a step's micro-batches as one."""
    return torch.cat([indices for indices, _ in slopes]), torch.cat([values for _, values in slopes])
