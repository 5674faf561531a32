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
from reweighting.bilevel.label_correction import LabelSlopes, StepLabels, training_ids
from reweighting.bilevel.losses import LossFunction
from reweighting.distributed import collectives
from reweighting.distributed.flat_vectors import unflatten
from reweighting.modeling.collate import Batch

MicroBatch = tuple[int, int, Batch]  # (number of the micro-step, domain, batch)
# Of a micro-batch, in all processes together, [n] each: the indices of weights; -1, or the places of labels; and the
# derivatives of what the weight, or the weight times the label, multiplies. There is an entry for the domain's weight
# or for each chain's, and where labels are corrected one for each label.
Slopes = tuple[Tensor, Tensor, Tensor]


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
        labels: Those that are corrected; `loss` then has their costs behind each chain's part.

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
        labels: StepLabels | None = None,
    ):
        check_optimizer(optimizer)
        self.optimizer, self.params, self.loss, self.derivative = optimizer, params, loss, derivative
        self.by_chain, self.labels = by_chain, labels
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
        parts = self.derivative(self.loss, self.params, batches, direction)  # [B] each, with labels [B, 1 + S]
        if self.labels is None:
            return self._weight_slopes(micro_batches, parts)
        of_weights = self._weight_slopes(micro_batches, [part[:, 0] for part in parts])
        of_labels = self._label_slopes(micro_batches, [part[:, 1:] for part in parts], self.labels)
        return [_concatenated(pair) for pair in zip(of_weights, of_labels, strict=True)]

    def _weight_slopes(self, micro_batches: list[MicroBatch], parts: list[Tensor]) -> list[Slopes]:
        """The entries of the weights. parts: the derivative of each chain's part, [B] for each micro-batch."""
        if self.by_chain:
            chain_ids = [training_ids(batch) for *_, batch in micro_batches]
            return _gathered([(ids, _no_label(ids), part.cpu()) for ids, part in zip(chain_ids, parts, strict=True)])
        sums = collectives.all_reduce_sum(torch.stack([part.sum() for part in parts])).cpu()  # [micro-batches]
        domains = torch.tensor([domain for _, domain, _ in micro_batches])
        return list(zip(domains.split(1), _no_label(domains).split(1), sums.split(1), strict=True))

    def _label_slopes(self, micro_batches: list[MicroBatch], costs: list[Tensor], labels: StepLabels) -> list[Slopes]:
        """The entries of the labels. costs: the derivative of each label's cost, [B, S] for each micro-batch."""
        own = []
        for (_, domain, batch), cost in zip(micro_batches, costs, strict=True):
            places = labels.places(batch)  # [B, S]
            ids = training_ids(batch)
            weight = ids if self.by_chain else torch.full_like(ids, domain)  # [B]
            has_label = places >= 0
            own.append((weight[:, None].expand_as(places)[has_label], places[has_label], cost.cpu()[has_label]))
        return _gathered(own)

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
        label_total = torch.zeros(0 if self.labels is None else len(self.labels), dtype=torch.float64)
        labels_met = torch.zeros(len(label_total), dtype=torch.int64)
        if self.by_chain:
            self.times_met = torch.zeros(len(weights), dtype=torch.int64)
        if self.labels is not None:
            self.label_slopes = LabelSlopes(label_total, labels_met)  # filled below
        if not steps:  # every step was left out
            return total.to(weights)
        micro_batches = [micro_batch for step in steps for micro_batch in step.micro_batches]
        slopes = iter(self._slopes(micro_batches, self.direction(v)))
        weights = weights.detach()
        on_cpu = weights.cpu()
        for step, factor in zip(steps, self._factors([step.learning_rate for step in steps]), strict=True):
            indices, labels, products = _concatenated([next(slopes) for _ in step.micro_batches])  # [n] each
            products = factor / len(step.micro_batches) * products  # g_nk is a gradient divided by M
            is_weight, is_label = labels < 0, labels >= 0
            if step.along is not None:
                *_, along = _concatenated(step.along)
                # The step's gradient is the sum of the weights' entries: those of labels are parts of them.
                summed = torch.where(is_weight, on_cpu[indices], 0)
                products = through_clipping(products, along, step.clip_factor, summed)
            total.index_add_(0, indices[is_weight], products[is_weight].double())  # on the CPU: in a fixed order
            if self.times_met is not None:
                self.times_met += torch.bincount(indices[is_weight], minlength=len(weights))
            label_total.index_add_(0, labels[is_label], (on_cpu[indices] * products)[is_label].double())
            labels_met += torch.bincount(labels[is_label], minlength=len(labels_met))
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


def _no_label(indices: Tensor) -> Tensor:
    """What stands in place of the labels in the entries of weights."""
    return torch.full_like(indices, -1)


def _concatenated(slopes: Sequence[Slopes]) -> Slopes:
    """Several lists of entries as one."""
    indices, labels, values = (torch.cat(column) for column in zip(*slopes, strict=True))
    return indices, labels, values


def _gathered(own: list[Slopes]) -> list[Slopes]:
    """The entries of all processes for each micro-batch, from this process's."""
    return [_concatenated(one) for one in zip(*collectives.all_gather_object(own), strict=True)]
