"""The two levels as Betty problems.

    lower   PRM fine-tuning: minimise over phi   mean_k w_k * mean over step rows of domain k of (sigmoid(z) - p)^2
    upper   domain reweighting: minimise over alpha the meta loss (sigmoid(A) - r)^2 of the PRM that comes out, with A
            the aggregate of a chain's step logits (centred among the answers that it is compared with) and r whether
            its final answer is right

Betty (0.2.1) keeps its part: the dependency graph, when a level steps, unrolling. `BettyProblemAdapter` replaces
what it does otherwise: it rebuilds optimizers and schedulers from their defaults, trains frozen parameters, steps
schedulers at every micro-batch, knows bf16 on CUDA only and synchronises the device at every loss. The lower problem's
micro-batches hold one domain each, so that its backward pass yields that domain's gradient; see `unrolled.py`.

Of several processes each has a share of every batch. A level's loss is then the sum of the processes' losses, and its
step, the same in all of them, follows the sum of their gradients; see `sharding.py`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from reweighting.bilevel.betty_adapter import BettyProblemAdapter
from reweighting.bilevel.hypergradients.directional import (
    RADIUS,
    DirectionalHypergradient,
    central_differences,
    forward_mode,
)
from reweighting.bilevel.hypergradients.unrolled import UnrolledHypergradient
from reweighting.bilevel.nonfinite import MicroBatch, NonFinite
from reweighting.data.chains import Chain
from reweighting.devices import autocast
from reweighting.distributed import collectives
from reweighting.distributed.flat_vectors import unflatten
from reweighting.modeling.aggregation import aggregate
from reweighting.modeling.collate import Batch

DIRECTIONAL_METHODS = ("jvp", "finite_difference")  # ways of a `DirectionalHypergradient`


class PRMFineTuning(BettyProblemAdapter):
    """Lower level. A batch is (domain index, Batch of that domain's chains).

    learning_rate: optimizer step (from 0) -> its learning rate. clip: largest norm of a step's gradient, 0 for none.
    fixed_weights: [K], where there is no upper level. The config's `type` says where the hypergradient comes from:
    `unrolled`, a way of `DIRECTIONAL_METHODS`, or Betty's `darts` and `sama`; its `warmup_steps`, at how many
    micro-steps the upper level starts. A step whose loss or gradient is not finite is left out before
    it touches a parameter.
    """

    def __init__(
        self, *args, learning_rate: Callable[[int], float], clip: float = 0.0, fixed_weights: Tensor | None = None
    ):
        super().__init__("lower", *args)
        self.learning_rate, self.clip, self.fixed_weights = learning_rate, clip, fixed_weights
        self.window: UnrolledHypergradient | DirectionalHypergradient | None = (
            None  # where it is not Betty's own hypergradient
        )
        if fixed_weights is None and self.config.type == "unrolled":
            self.window = UnrolledHypergradient(self.optimizer)
        elif fixed_weights is None and self.config.type in DIRECTIONAL_METHODS:
            slopes = forward_mode
            if self.config.type == "finite_difference":
                slopes = partial(central_differences, radius=RADIUS["bf16" if self.precision == "bf16" else "fp32"])
            self.window = DirectionalHypergradient(
                self.optimizer, self.named_trainables(), self.loss_at, self.draw, slopes
            )
        self.gradient: Tensor | None = None  # of the step so far, [P]
        self.total: Tensor | None = None  # where it is added up
        self.micro_batches: list[MicroBatch] = []  # of the step so far
        self.rows_seen = 0

    def domain_loss(self, batch: Batch) -> Tensor:
        """Mean over the labeled steps of a batch of (sigmoid(z) - p)^2, this process's share of it: a scalar."""
        return squared_error(self.module(batch), batch)

    def loss_at(self, params: dict[str, Tensor], batch: Batch) -> Tensor:
        """`domain_loss` with other values of the trained parameters and without dropout."""
        was_training = self.module.training
        self.module.eval()
        try:
            with autocast(torch.device(self.device), self.precision):
                return squared_error(functional_call(self.module, params, (batch,)), batch)
        finally:
            self.module.train(was_training)

    def training_step(self, batch: tuple[int, Batch]) -> Tensor:
        """w_k times the domain's loss."""
        domain, chains = batch
        loss = self.domain_loss(chains)
        self.loss = loss.detach()  # without the weight, so that runs with different weights can be compared
        weights = self.domain_weights()
        return (weights if self.window is None else weights.detach())[domain] * loss

    def domain_weights(self) -> Tensor:
        """The weights w [K] that hold now."""
        if self.fixed_weights is not None:
            return self.fixed_weights
        weights = self.upper.module()
        return torch.ones_like(weights) if self.warming_up else weights

    @property
    def warming_up(self) -> bool:
        """Whether the upper level has not begun: the newest micro-step is one of Betty's `warmup_steps`."""
        return 0 < self.warmup_steps and self._count <= self.warmup_steps

    @property
    def open_window(self) -> UnrolledHypergradient | DirectionalHypergradient | None:
        """The window that keeps the steps of now, if one does."""
        return None if self.warming_up else self.window

    def ends_window(self, step: int) -> bool:
        """Whether the upper level steps after this optimizer step (from 1): Betty's rule, told beforehand."""
        return step % self.config.unroll_steps == 0 and step * self.gas > self.warmup_steps

    def backward(self, loss: Tensor, params, paths, **options) -> None:
        """Add this micro-batch's share to the step's gradient, and keep it in the window."""
        storage = self.open_window.storage() if isinstance(self.open_window, UnrolledHypergradient) else None
        share = self.layout.local_gradient(loss, storage)
        domain, chains = self.cur_batch
        self.rows_seen += chains.num_labeled_steps
        finite = loss.isfinite()
        if len(share):  # a process may hold no part of what is trained
            # The largest entry is no number as soon as one is none.
            finite = finite & torch.linalg.vector_norm(share, math.inf).isfinite()
        self.micro_batches.append(MicroBatch(chains.chains, self.loss, finite))
        if self.gradient is None:
            self.gradient = share
        else:
            self.total = self.gradient = torch.add(self.gradient, share, out=self.total)
        if isinstance(self.open_window, UnrolledHypergradient):
            self.open_window.add_micro_batch(domain, share)
        elif self.open_window is not None:
            self.open_window.add_micro_batch(self._count - 1, domain, chains)

    def state_dict(self) -> dict:
        """As every problem's, the rows seen and the window so far."""
        window = {} if self.window is None else self.window.state(self.layout)
        return super().state_dict() | {"rows_seen": self.rows_seen, "micro_steps": self.gas, "window": window}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        super().load_state_dict(state)
        self._count = state["count"] // state["micro_steps"] * self.gas
        self.rows_seen = state["rows_seen"]
        begun = state["window"].get("steps") or state["window"].get("replayed")
        if self.open_window is not None and begun:
            if ("replayed" in state["window"]) != isinstance(self.open_window, DirectionalHypergradient):
                raise ValueError("--hypergradient can be changed between windows only, and this is inside one")
            self.open_window.load(state["window"], self.layout, self.device)

    def optimizer_step(self) -> None:
        """Clip, step the optimizer, and close the step in the window; or leave the step out if it is not finite."""
        params, factor = self.trainable_parameters(), 1.0
        share, micro_batches = self.gradient, self.micro_batches
        self.gradient, self.micro_batches = None, []
        grad = self.layout.reduce_gradient(share)
        if not collectives.all_ranks_true(torch.stack([one.finite for one in micro_batches])).all():
            self.set_gradients(params, grad)
            self.nonfinite = NonFinite.collect("lower", micro_batches, self.named_gradients())
            if self.open_window is not None:
                self.open_window.drop_step()
            return
        if self.clip:
            norm = self.layout.norm(grad)
            factor = min(1.0, self.clip / norm) if norm > 0 else 1.0
        self.set_gradients(params, grad if factor == 1.0 else grad * factor)
        lr = self.learning_rate(self._count // self.gas - 1)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        if self.config.type == "sama":  # Betty's sama looks for the last gradient here
            for param in params:
                self.optimizer.state[param]["last_grad"] = param.grad.clone()
        if isinstance(self.open_window, UnrolledHypergradient):
            self.open_window.close_step(factor, lr, None if grad is share else grad)
        elif self.open_window is not None:
            self.open_window.close_step(factor, lr)

    @staticmethod
    def set_gradients(params: list[torch.nn.Parameter], gradient: Tensor) -> None:
        """Make the vector [P] the parameters' gradients."""
        for param, piece in zip(params, unflatten(gradient, params), strict=True):
            param.grad = piece


class DomainReweighting(BettyProblemAdapter):
    """Upper level. A batch is a list of Batches of meta chains, whose `labels` say whether the final answer is right;
    several small ones are faster than a large one.

    positive_rate: the share of right answers among all meta chains, to centre the aggregates; None to take them as they
    are.
    """

    def __init__(self, *args, aggregation: str = "mean_logit", positive_rate: float | None = None):
        super().__init__("upper", *args)
        self.aggregation, self.positive_rate = aggregation, positive_rate

    def training_step(self, batches: list[Batch]) -> Tensor:
        """Mean over meta chains of (sigmoid(A) - r)^2, with A centred by `centering_groups` unless
        `positive_rate` is None.
        Of several processes, each one's share of it."""
        logits = ((self.lower.module(batch), batch.step_mask) for batch in batches)
        aggregates = torch.cat([aggregate(z, mask, self.aggregation) for z, mask in logits])  # [B] of these batches
        labels = torch.cat([batch.labels for batch in batches])
        shares = collectives.all_gather_object(_chains(batches))
        chains = [chain for share in shares for chain in share]
        if self.positive_rate is not None:
            groups, level = centering_groups(chains, self.positive_rate)
            level = level.to(aggregates)
            counts = torch.bincount(groups).to(aggregates)
            own = groups.split([len(share) for share in shares])[collectives.rank()].to(aggregates.device)
            sums = collectives.differentiable_all_reduce_sum(torch.zeros_like(level).index_add(0, own, aggregates))
            aggregates = aggregates + (level - sums / counts)[own]
        loss = (aggregates.sigmoid() - labels).square().sum() / len(chains)
        self.loss = loss.detach()
        return loss

    def backward(self, loss: Tensor, params, paths, **options) -> None:
        """Set alpha's gradient: the window hypergradient, or Betty's own (`darts`, `sama`). If it is not finite, alpha
        gets none, and the update is left out."""
        if self.lower.window is None:
            super().backward(loss, params, paths, **options)
        else:
            v = self.lower.layout.reduce_gradient(self.lower.layout.local_gradient(loss))
            weights = self.module()
            towards = self.lower.window.hypergradient(v, weights)
            self.lower.window.clear()
            self.set_grads(params, torch.autograd.grad(weights, params, grad_outputs=towards.to(weights.dtype)))
        finite = loss.isfinite() & torch.stack([param.grad.isfinite().all() for param in params]).all()
        if not collectives.all_ranks_true(finite):
            micro_batch = MicroBatch(_chains(self.cur_batch), self.loss, finite)
            self.nonfinite = NonFinite.collect("upper", [micro_batch], self.named_gradients())
            self.zero_grad()


def squared_error(logits: Tensor, batch: Batch) -> Tensor:
    """Mean over the labeled steps of a batch of (sigmoid(z) - p)^2, from the step logits z [B, S]: a scalar. Where
    processes share the batch, this one's share of it."""
    errors = (logits.sigmoid() - batch.targets).square()
    return errors[batch.target_mask].sum() / batch.num_labeled_steps


def _chains(batches: list[Batch]) -> list[Chain]:
    return [chain for batch in batches for chain in batch.chains]


def centering_groups(chains: Sequence[Chain], positive_rate: float) -> tuple[Tensor, Tensor]:
    """Which answers are compared with each other, and where their mean belongs.

    Choosing compares the answers to one question, so what these have in common does not matter; and it would drown the
    rest: a domain whose labels are too high on the whole is a cheap remedy for scores that are too low, however poor
    its labels. Right and wrong answers to one question are a group; all others together are one more.

    Returns the group of each chain [B] and, for each group, the logit of its share of right answers [G]; for the one of
    all others that of `positive_rate`, the share in the whole meta set.
    """
    labels = defaultdict(list)
    for chain in chains:
        labels[chain.prompt].append(chain.label)
    shares = {key: sum(found) / len(found) for key, found in labels.items()}
    mixed = [key for key, share in shares.items() if 0 < share < 1]
    number = {key: index for index, key in enumerate(mixed)}
    groups = [number.get(chain.prompt, len(mixed)) for chain in chains]
    used = [shares[key] for key in mixed] + [positive_rate] * (len(mixed) in groups)
    return torch.tensor(groups), torch.logit(torch.tensor(used))
