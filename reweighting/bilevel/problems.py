"""The two levels of the method, as Betty problems.

    lower   fine-tune the reward model:  minimise over phi    sum over domains k of  w_k * mean (sigmoid(z) - p)^2,
            or the binary cross-entropy in place of the squared error
    upper   reweight the domains:        minimise over alpha  mean (sigmoid(A) - r)^2  of the model that comes out

phi are the trained parameters of the reward model, w = w(alpha) the weights of the K domains (`domain_weights.py`), z
the logit of a step and p its label in [0, 1]. A is the aggregate of a meta chain's step logits, centered among the
answers that it is compared with (`losses.py`), and r in {0, 1} tells whether its final answer is correct.

The upper loss depends on alpha through the optimizer steps of a window. How, a `Hypergradient` finds
(`hypergradients/`). Betty keeps the dependency graph, the unrolling and the order in which the levels step.

Of several processes each holds a part of every batch. A level's loss is the sum of the processes' losses, and its step
follows the sum of their gradients, so that all processes make the same step.
"""

import math
from collections.abc import Callable

import torch
from betty.configs import Config
from torch import Tensor, nn
from torch.optim import Optimizer

from reweighting.bilevel.betty_adapter import BettyProblemAdapter
from reweighting.bilevel.domain_weights import LossWeights
from reweighting.bilevel.evidence import SlopeEvidence
from reweighting.bilevel.hypergradients.base import Hypergradient
from reweighting.bilevel.instance_evidence import InstanceEvidence
from reweighting.bilevel.label_correction import LabelCorrection, StepLabels
from reweighting.bilevel.losses import StepLoss, center_aggregates, loss_parts, mean_loss, squared_error
from reweighting.bilevel.nonfinite import MicroBatch, NonFinite
from reweighting.bilevel.step_gradient import StepGradient, is_finite
from reweighting.data.chains import Chain
from reweighting.distributed import collectives
from reweighting.distributed.flat_vectors import flatten, unflatten
from reweighting.distributed.sharding import Replicated
from reweighting.modeling.aggregation import AggregationName, aggregate
from reweighting.modeling.collate import Batch
from reweighting.modeling.reward_model import ProcessRewardModel


class PRMFineTuning(BettyProblemAdapter):
    """Lower level: fine-tune the reward model on the weighted sum of the domains' losses.

    A micro-batch is (domain, batch of that domain's chains); a step is the mean over `config.gradient_accumulation` of
    them. A step whose loss or gradient is not finite is left out before it touches a parameter.

    Args:
        config: Betty's: `unroll_steps`, `gradient_accumulation`, `precision`, and `warmup_steps`, the micro-steps
            before the upper level starts.
        module: The reward model.
        optimizer: Over its trained parameters, one group.
        fetch_batch: (micro-step from 0) -> (domain, batch).
        learning_rate: (optimizer step from 0) -> learning rate.
        step_loss: Of `losses.STEP_LOSSES`, the same as the hypergradient's.
        hypergradient: Receives each step, where the weights are learned; the same object as the upper level's.
        fixed_weights: The weights, where they are not.
        labels: Those that the upper level corrects, if it does; the same object as the hypergradient's.
        max_grad_norm: Clips a step's gradient to this norm; 0 does not clip.
        layout: How the parameters lie on the processes; by default each holds all of them.

    Attributes:
        upper: The upper level, which Betty makes an attribute; there is none with fixed weights.
    """

    module: ProcessRewardModel
    upper: "DomainReweighting"

    def __init__(
        self,
        config: Config,
        module: ProcessRewardModel,
        optimizer: Optimizer,
        fetch_batch: Callable[[int], tuple[int, Batch]],
        *,
        learning_rate: Callable[[int], float],
        step_loss: StepLoss = squared_error,
        hypergradient: Hypergradient | None = None,
        fixed_weights: LossWeights | None = None,
        labels: StepLabels | None = None,
        max_grad_norm: float = 0.0,
        layout: Replicated | None = None,
    ):
        if (hypergradient is None) == (fixed_weights is None):
            raise ValueError("expected a hypergradient or fixed weights")
        super().__init__("lower", config, module, optimizer, fetch_batch, layout)
        self.learning_rate, self.step_loss, self.max_grad_norm = learning_rate, step_loss, max_grad_norm
        self.hypergradient, self.fixed_weights, self.labels = hypergradient, fixed_weights, labels
        self.step_gradient = StepGradient()
        self.micro_batches: list[MicroBatch] = []  # of the step so far
        self.rows_seen = 0

    def domain_loss(self, batch: Batch) -> Tensor:
        """Compute the mean loss of the labeled steps of a batch, a scalar."""
        return mean_loss(self.step_losses(batch), batch)

    def step_losses(self, batch: Batch) -> Tensor:
        """Compute the loss of each step, [B, S]; of steps without a target, any number."""
        return self.step_loss(self.module(batch), batch)

    @property
    def weights(self) -> LossWeights:
        """The weights, fixed or learned."""
        return self.upper.module if self.fixed_weights is None else self.fixed_weights

    @torch.no_grad()
    def domain_weights(self) -> Tensor:
        """Return the weights w [K] that hold now: all 1 until the upper level starts."""
        weights = self.weights.by_domain()
        return torch.ones_like(weights) if self.warming_up else weights

    def training_step(self, batch: tuple[int, Batch]) -> Tensor:
        """Compute w_k times the domain's loss, or the sum of each chain's weight times its part of it; a scalar."""
        domain, chains = batch
        if self.labels is not None:
            chains = self.labels.corrected(chains)
        if self.weights.by_chain and not self.warming_up:
            errors = self.step_losses(chains)  # [B, S]
            losses = loss_parts(errors, chains)  # [B]
            weights = self.weights.of_chains(chains, errors.detach())
        else:
            losses = self.domain_loss(chains)
            weights = torch.ones_like(losses) if self.warming_up else self.weights.held()[domain]
        self.loss = losses.detach().sum()  # reported without weights, so that runs with different ones can be compared
        return (weights * losses).sum()  # autocast would round a dot product

    def differentiate(self, loss: Tensor) -> None:
        """Add the micro-batch's gradient to the step's, and report it to the hypergradient."""
        domain, chains = self.cur_batch
        gradient = self.layout.local_gradient(loss)
        self.step_gradient.add(gradient)
        self.micro_batches.append(MicroBatch(chains.chains, self.loss, is_finite(loss, gradient)))
        self.rows_seen += chains.num_labeled_steps
        if (window := self._window) is not None:
            window.add_micro_batch(self._count - 1, domain, chains, gradient)

    def optimizer_step(self, *args, **kwargs) -> None:
        """Clip the step's gradient and update phi; leave the step out if anything in it is not finite."""
        params, window = self.trainable_parameters(), self._window
        gradient = self.layout.reduce_gradient(self.step_gradient.take())  # [P], of all processes
        micro_batches, self.micro_batches = self.micro_batches, []
        if not collectives.all_ranks_true(torch.stack([one.finite for one in micro_batches])).all():
            self._set_gradient(params, gradient)
            self.nonfinite = NonFinite.collect("lower", micro_batches, self.named_gradients())
            if window is not None:
                window.drop_step()
            return
        clip_factor = self._clip_factor(gradient)
        self._set_gradient(params, gradient if clip_factor == 1.0 else gradient * clip_factor)
        learning_rate = self.learning_rate(self._count // self.gas - 1)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        if window is not None:
            window.close_step(gradient, clip_factor, learning_rate)

    def _clip_factor(self, gradient: Tensor) -> float:
        """What clipping multiplies a gradient [P] with."""
        if not self.max_grad_norm:
            return 1.0
        norm = self.layout.norm(gradient)
        return min(1.0, self.max_grad_norm / norm) if norm > 0 else 1.0

    @staticmethod
    def _set_gradient(params: list[nn.Parameter], gradient: Tensor) -> None:
        """Make the vector [P] the parameters' gradients."""
        for param, piece in zip(params, unflatten(gradient, params), strict=True):
            param.grad = piece

    @property
    def warming_up(self) -> bool:
        """Whether the newest micro-step is one of `warmup_steps`, before the upper level starts."""
        return 0 < self.warmup_steps and self._count <= self.warmup_steps

    @property
    def _window(self) -> Hypergradient | None:
        """The hypergradient, if the newest step belongs to a window at whose end the weights are updated."""
        return None if self.warming_up else self.hypergradient

    def ends_window(self, step: int) -> bool:
        """Tell whether the upper level steps after this optimizer step (from 1), by Betty's rule."""
        return step % self.config.unroll_steps == 0 and step * self.gas > self.warmup_steps

    def state_dict(self) -> dict:
        """Return the state of every problem, the rows seen and the window so far. Every process calls it."""
        window = {} if self.hypergradient is None else self.hypergradient.state()
        return super().state_dict() | {"rows_seen": self.rows_seen, "micro_steps": self.gas, "window": window}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a state.

        Raises:
            ValueError: It does not fit what is trained now, or another method has written the window.
        """
        super().load_state_dict(state_dict)
        step = state_dict["count"] // state_dict["micro_steps"]
        self._count = step * self.gas
        self.rows_seen = state_dict["rows_seen"]
        if step % self.config.unroll_steps and (window := self._window) is not None:
            window.load(state_dict["window"], self.fetch_batch)


class DomainReweighting(BettyProblemAdapter):
    """Upper level: update the raw weights after each window of the lower level.

    Below, alpha and w stand for the domains' weights. Of single chains' weights the same holds.

    A batch is a list of batches of meta chains, whose `labels` tell whether the final answer is correct; several small
    ones are faster than a large one.

    Args:
        config: Betty's: `precision`.
        module: The table of raw parameters.
        optimizer: Over alpha.
        fetch_batch: (update from 0) -> list of batches.
        hypergradient: Has received the steps of the window; the same object as the lower level's.
        evidence: Receives the domains' hypergradient of each window.
        instance_evidence: Receives the chains', where these have weights.
        label_correction: Receives the labels', where these are corrected, and moves them.
        aggregation: How the step logits of a chain become its aggregate A, see `modeling/aggregation.py`.
        positive_rate: Fraction of correct answers in the whole meta set, to center the aggregates by; None does not
            center them.
        weight_bounds: Lowest and highest weight.

    Attributes:
        lower: The lower level, which Betty makes an attribute.
        window_slopes: Of the newest window [K], see `evidence.py`, 0 if it tells nothing; None if it was not finite.
    """

    module: LossWeights
    lower: PRMFineTuning

    def __init__(
        self,
        config: Config,
        module: LossWeights,
        optimizer: Optimizer,
        fetch_batch: Callable[[int], list[Batch]],
        *,
        hypergradient: Hypergradient,
        evidence: SlopeEvidence,
        instance_evidence: InstanceEvidence | None = None,
        label_correction: LabelCorrection | None = None,
        aggregation: AggregationName = "mean_logit",
        positive_rate: float | None = None,
        weight_bounds: tuple[float, float] = (0.0, math.inf),
    ):
        super().__init__("upper", config, module, optimizer, fetch_batch)
        self.hypergradient, self.aggregation, self.positive_rate = hypergradient, aggregation, positive_rate
        self.evidence, self.instance_evidence, self.weight_bounds = evidence, instance_evidence, weight_bounds
        self.label_correction = label_correction
        self.window_slopes: Tensor | None = None

    def training_step(self, batch: list[Batch]) -> Tensor:
        """Compute the mean of (sigmoid(A) - r)^2 over meta chains; of several processes, this one's part of it."""
        logits = [(self.lower.module(part), part.step_mask) for part in batch]  # [b, S] each
        aggregates = torch.cat([aggregate(z, mask, self.aggregation) for z, mask in logits])  # [B]
        labels = torch.cat([part.labels for part in batch])  # [B]
        if self.positive_rate is not None:
            aggregates = center_aggregates(aggregates, _chains(batch), self.positive_rate)
        count = collectives.all_reduce_sum(torch.tensor(len(labels))).item()  # of all processes
        loss = (aggregates.sigmoid() - labels).square().sum() / count
        self.loss = loss.detach()
        return loss

    def differentiate(self, loss: Tensor) -> None:
        """Set alpha's gradient: the meta gradient through the window (dL/dw), then through w(alpha).

        The evidence counts the window. If the gradient is not finite, alpha gets none, and the update is left out.
        """
        params, layout = self.trainable_parameters(), self.lower.layout
        v = layout.reduce_gradient(flatten(layout.local_gradient(loss)))  # dL_meta / dphi, [P]
        weights = self.module()  # w(alpha): [K], or [C] of the chains
        toward_weights = self.hypergradient.compute(v, weights.detach())  # dL_meta / dw
        gradients = torch.autograd.grad(weights, params, grad_outputs=toward_weights.to(weights.dtype))
        self.set_grads(params, gradients)
        found = [toward_weights, *gradients]
        label_slopes = self.hypergradient.label_slopes
        if label_slopes is not None:
            found.append(label_slopes.gradient.to(loss.device))
        finite = loss.isfinite() & torch.stack([one.isfinite().all() for one in found]).all()
        self.window_slopes = None
        if not collectives.all_ranks_true(finite):
            micro_batch = MicroBatch(_chains(self.cur_batch), self.loss, finite)
            self.nonfinite = NonFinite.collect("upper", [micro_batch], self.named_gradients())
            self.zero_grad()
        else:
            with torch.no_grad():
                toward_domains = self.module.slopes_by_domain(toward_weights)  # [K]
            self.window_slopes = self.evidence.add(toward_domains)
            if self.instance_evidence is not None and self.hypergradient.times_met is not None:
                self.instance_evidence.add(toward_weights, self.hypergradient.times_met)
            if self.label_correction is not None and label_slopes is not None:
                self.label_correction.add(label_slopes)

    def optimizer_step(self, *args, **kwargs) -> None:
        """Update alpha, and the labels."""
        self.optimizer.step()
        self.module.bound_(*self.weight_bounds)
        if self.label_correction is not None:
            self.label_correction.step()
        self.module.begin_window()

    def state_dict(self) -> dict:
        """Return the state of every problem, the evidence and the labels. Every process calls it."""
        instances = None if self.instance_evidence is None else self.instance_evidence.state_dict()
        labels = None if self.label_correction is None else self.label_correction.state_dict()
        state = super().state_dict() | {"evidence": self.evidence.state_dict(), "instances": instances}
        return state | {"observations": self.module.observations(), "labels": labels}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a state.

        Raises:
            ValueError: It does not fit what is trained now.
        """
        super().load_state_dict(state_dict)
        self.module.load_observations(state_dict["observations"])
        self.evidence.load_state_dict(state_dict["evidence"])
        if self.instance_evidence is not None:
            self.instance_evidence.load_state_dict(state_dict["instances"])
        if self.label_correction is not None:
            self.label_correction.load_state_dict(state_dict["labels"])


def _chains(batches: list[Batch]) -> list[Chain]:
    return [chain for batch in batches for chain in batch.chains]
