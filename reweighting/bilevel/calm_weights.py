"""The calm rule of the upper level: weights that are a function of the evidence, not a sum of steps.

AdamW moves alpha by full steps along every window's hypergradient, however noisy it is, and further with each window.
The calm rule sets

    alpha_k  =  range * B * m_k / q_k        B  =  max(0,  1 - sum_k e_k^2 / sum_k m_k^2)

m_k is the mean slope of domain k over all windows so far, q_k the root of its mean square, and e_k the standard error
of m_k (`evidence.py`). The quotient m_k / q_k lies between -1 and 1: it says how steadily the windows agree, does not
grow with their number, and is free of units. B is 0 where the mean slopes of all domains together are no larger than
their standard errors, and near 1 where they are much larger: shrinkage in the manner of James and Stein (1961).

The raw weight beta of a chain (`instance_weights.py`) is

    beta_i  =  range / 2 * (the best guess of its true slope, in standard deviations of the true slopes)

which is 0 as well where chance would explain all that the chains' slopes differ by (`instance_evidence.py`).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.optim import Optimizer

from reweighting.bilevel.domain_weights import DomainWeights, LossWeights
from reweighting.bilevel.evidence import SlopeEvidence
from reweighting.bilevel.instance_evidence import InstanceEvidence
from reweighting.bilevel.instance_weights import InstanceWeights


class CalmWeights(Optimizer):
    """Set the raw weights to what the evidence says. Its state is the evidence's.

    Args:
        table: The raw weights: alpha [K], beta [C], or both.
        evidence: Of the windows so far; it has counted each window before `step`.
        raw_range: The largest raw weight of a domain, positive or negative.
        instance_evidence: The same for chains, where these have weights.
    """

    def __init__(
        self,
        table: LossWeights,
        evidence: SlopeEvidence,
        raw_range: float,
        instance_evidence: InstanceEvidence | None = None,
    ):
        super().__init__(list(table.parameters()), {})
        self.evidence, self.instance_evidence, self.raw_range = evidence, instance_evidence, raw_range
        self.domain_weights = table if isinstance(table, DomainWeights) else None
        self.instance_weights = None
        if isinstance(table, InstanceWeights):
            self.domain_weights, self.instance_weights = table.domain_weights, table

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Set alpha and beta; neither their gradients nor a closure are used."""
        if self.domain_weights is not None:
            raw = self.raw_range * trust(self.evidence) * agreement(self.evidence, self.evidence.mean)
            self.domain_weights.alpha.copy_(raw)
        if self.instance_weights is not None and self.instance_evidence is not None:
            guesses = self.instance_evidence.true_slopes().clamp(-2, 2)
            self.instance_weights.beta.copy_(self.raw_range / 2 * guesses)

    def weight_intervals(self) -> list[tuple[float, float]] | None:
        """Return each domain's confidence interval of its weight; None where nothing can be told or is learned.

        It holds the weights that the ends of the slope's interval would give by themselves, without shrinkage, and the
        weight that the domain has.
        """
        slopes = self.evidence.slopes()
        if self.domain_weights is None or not slopes.half_width.isfinite().all():
            return None
        positive = softplus(self.domain_weights.alpha.detach().to("cpu", torch.float64))
        ends = [positive]
        for end in (slopes.mean - slopes.half_width, slopes.mean + slopes.half_width):
            ends.append(softplus(self.raw_range * agreement(self.evidence, end)))
        weights = torch.stack(ends) / positive.mean()  # [3, K]
        return list(zip(weights.amin(0).tolist(), weights.amax(0).tolist(), strict=True))


def agreement(evidence: SlopeEvidence, slopes: Tensor) -> Tensor:
    """Return slopes [K] divided by the root of the windows' mean square, between -1 and 1; 0 where all are 0."""
    return (slopes / evidence.mean_square.sqrt()).nan_to_num(nan=0.0).clamp(-1, 1)


def trust(evidence: SlopeEvidence) -> float:
    """Return B, from 0 where the slopes may be chance to 1."""
    slopes = evidence.slopes()
    noise, signal = slopes.standard_error.square().sum().item(), slopes.mean.square().sum().item()
    if not math.isfinite(noise) or signal == 0:
        return 0.0
    return max(0.0, 1 - noise / signal)
