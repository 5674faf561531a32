"""The two levels as Betty problems.

    lower   PRM fine-tuning: minimise over phi   mean_k w_k * mean over step rows of domain k of (sigmoid(z) - p)^2
    upper   domain reweighting: minimise over alpha the meta loss (sigmoid(A) - r)^2 of the PRM that comes out, with A
            the aggregate of a chain's step logits and r whether its final answer is right

Betty (0.2.1) keeps its part: the dependency graph, when a level steps, unrolling. `OwnSystems` replaces what it does
otherwise: it rebuilds optimizers and schedulers from their defaults, trains frozen parameters, steps schedulers at
every micro-batch, knows bf16 on CUDA only and synchronises the device at every loss. The lower problem's micro-batches
hold one domain each, so that its backward pass yields that domain's gradient; see `hypergradient.py`.
"""

import math
from collections.abc import Callable

import torch
from betty.configs import Config
from betty.problems import ImplicitProblem
from torch import Tensor

from reweighting.aggregation import aggregate
from reweighting.chains import Batch
from reweighting.devices import autocast
from reweighting.errors import UserError
from reweighting.hypergradient import Window, flatten, unflatten


class OwnSystems(ImplicitProblem):
    """A Betty problem that keeps the module, optimizer, scheduler and data that it was given.

    draw: micro-step (from 0) -> batch on the device. A `training_step` leaves the loss to report in `self.loss`;
    `losses` are those since the last `mean_loss()`.
    """

    def __init__(self, name: str, config: Config, module, optimizer, scheduler, draw: Callable[[int], object]):
        super().__init__(name, config, module, optimizer)
        self.schedule = scheduler  # not Betty's `scheduler`, which it would step at every micro-batch
        self.draw, self.losses = draw, []

    def patch_optimizer(self) -> None:
        """Keep ours."""

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are not frozen."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def get_batch(self):
        """The batch of this micro-step; Betty has counted it already."""
        return self.draw(self._count - 1)

    def training_step_exec(self, batch) -> Tensor:
        """The loss, under autocast where `--precision bf16` asks for it, on any device."""
        with autocast(torch.device(self.device), self.precision):
            return self.training_step(batch)

    def get_loss(self, batch) -> tuple[Tensor, dict]:
        """As Betty's, without waiting for the device."""
        loss = self.training_step_exec(batch)
        self.losses.append(self.loss)
        return loss / self.gas, {}

    def state_dict(self) -> dict:
        """Trained parameters, optimizer, schedule and step count, at a window's end."""
        module = {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}
        state = {"module": module, "optimizer": self.optimizer.state_dict(), "count": self._count}
        return state if self.schedule is None else state | {"schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        self.module.load_state_dict(state["module"], strict=False)  # what is frozen was loaded with the backbone
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self._count, self._inner_loop_start = state["count"], True

    def mean_loss(self) -> float:
        """The mean of the losses since the last call. Waits for the device. NaN if there are none."""
        mean = torch.stack(self.losses).mean().item() if self.losses else float("nan")
        self.losses = []
        return mean


class PRMFineTuning(OwnSystems):
    """Lower level. A batch is (domain index, Batch of that domain's chains).

    clip: largest norm of a step's gradient, 0 for none. fixed_weights: [K], where there is no upper level.
    """

    def __init__(self, *args, clip: float = 0.0, fixed_weights: Tensor | None = None):
        super().__init__("lower", *args)
        self.clip, self.fixed_weights = clip, fixed_weights
        self.window = Window(self.optimizer) if fixed_weights is None and self.config.type == "window" else None
        self.gradient: Tensor | None = None  # of the step so far, [P]
        self.rows_seen = 0

    def domain_loss(self, batch: Batch) -> Tensor:
        """Mean over the labelled steps of a batch of (sigmoid(z) - p)^2: a scalar."""
        scores = self.module(batch).sigmoid()  # [B, S]
        errors = (scores - batch.targets).square()
        return errors[batch.target_mask].mean()

    def training_step(self, batch: tuple[int, Batch]) -> Tensor:
        """w_k times the domain's loss."""
        domain, chains = batch
        loss = self.domain_loss(chains)
        self.loss = loss.detach()  # without the weight, so that runs with different weights can be compared
        return self.domain_weights()[domain] * loss

    def domain_weights(self) -> Tensor:
        """The weights w [K] that hold now."""
        return self.upper.module() if self.fixed_weights is None else self.fixed_weights

    def backward(self, loss: Tensor, params, paths, **options) -> None:
        """Add this micro-batch's share to the step's gradient, and keep it in the window."""
        share = flatten(torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True))
        domain, chains = self.cur_batch
        self.rows_seen += chains.labelled
        self.gradient = share if self.gradient is None else self.gradient + share
        if self.window is not None:
            self.window.add_micro_batch(domain, share)

    def state_dict(self) -> dict:
        """As every problem's, and the rows seen."""
        return super().state_dict() | {"rows_seen": self.rows_seen}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        super().load_state_dict(state)
        self.rows_seen = state["rows_seen"]

    def optimizer_step(self) -> None:
        """Clip, step the optimizer and the scheduler, and close the step in the window."""
        params, grad, factor = self.trainable_parameters(), self.gradient, 1.0
        if self.clip:
            norm = grad.norm().item()
            factor = min(1.0, self.clip / norm) if norm > 0 else 1.0
        clipped = grad if factor == 1.0 else grad * factor
        for param, piece in zip(params, unflatten(clipped, params), strict=True):
            param.grad = piece
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        if self.config.type == "sama":  # Betty's sama looks for the last gradient here
            for param in params:
                self.optimizer.state[param]["last_grad"] = param.grad.clone()
        if self.schedule is not None:
            self.schedule.step()
        if self.window is not None:
            self.window.close_step(grad, factor, lr)
        self.gradient = None


class DomainReweighting(OwnSystems):
    """Upper level. A batch is a Batch of meta chains, whose `labels` say whether the final answer is right."""

    def __init__(self, *args, aggregation: str = "mean_logit"):
        super().__init__("upper", *args)
        self.aggregation = aggregation

    def training_step(self, batch: Batch) -> Tensor:
        """Mean over meta chains of (sigmoid(A) - r)^2."""
        aggregates = aggregate(self.lower.module(batch), batch.step_mask, self.aggregation)  # [B]
        loss = (aggregates.sigmoid() - batch.labels).square().mean()
        self.loss = loss.detach()
        return loss

    def backward(self, loss: Tensor, params, paths, **options) -> None:
        """Set alpha's gradient: the window hypergradient, or Betty's own (`darts`, `sama`)."""
        if self.lower.window is None:
            super().backward(loss, params, paths, **options)
            return
        lower = self.lower.trainable_parameters()
        v = flatten(torch.autograd.grad(loss, lower, allow_unused=True, materialize_grads=True))
        weights = self.module()
        towards = self.lower.window.hypergradient(v, weights)
        self.lower.window.clear()
        self.set_grads(params, torch.autograd.grad(weights, params, grad_outputs=towards.to(weights.dtype)))


def check_finite(name: str, value: float, step: int, remedy: str) -> None:
    """Raise UserError if a number that a run computed is not finite: nothing sensible can follow."""
    if not math.isfinite(value):
        raise UserError(f"{name} is {value} at step {step}: {remedy}")
