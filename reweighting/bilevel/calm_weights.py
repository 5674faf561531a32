"""The calm rule of the upper level: weights that are a function of the evidence, not a sum of steps.

AdamW moves alpha by full steps along every window's hypergradient, however noisy it is, and further with each window.
The calm rule sets

    alpha_k  =  range * B * m_k / q_k        B  =  max(0,  1 - 2 * sum_k e_k^2 / sum_k m_k^2)

m_k is the mean slope of domain k over all windows so far, q_k the root of its mean square, and e_k the standard error
of m_k (`evidence.py`). The quotient m_k / q_k lies between -1 and 1: it says how steadily the windows agree, does not
grow with their number, and is free of units. B is 0 while the slopes of all domains together are no larger than chance
makes them, and near 1 where they are much larger: James and Stein's shrinkage (1961) with twice its constant, so that
chance seldom moves a weight at all.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Optimizer

from reweighting.bilevel.evidence import SlopeEvidence

SHRINKAGE = 2.0


class CalmWeights(Optimizer):
    """Set the raw weights alpha to what the evidence says. Its state is the evidence's.

    Args:
        params: The table of raw weights: alpha [K].
        evidence: Of the windows so far; it has counted each window before `step`.
        alpha_range: The largest raw weight, positive or negative.
    """

    def __init__(self, params: list[nn.Parameter], evidence: SlopeEvidence, alpha_range: float):
        super().__init__(params, {"alpha_range": alpha_range})
        self.evidence = evidence

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Set alpha; neither its gradient nor a closure is used."""
        (group,) = self.param_groups
        (alpha,) = group["params"]
        alpha.copy_(group["alpha_range"] * trust(self.evidence) * agreement(self.evidence, self.evidence.mean))

    def weight_intervals(self) -> list[tuple[float, float]] | None:
        """Return each domain's confidence interval of its weight; None where nothing can be told.

        It holds the weights that the ends of the slope's interval would give by themselves, without shrinkage, and the
        weight that the domain has.
        """
        (group,) = self.param_groups
        (alpha,) = group["params"]
        slopes = self.evidence.slopes()
        if not slopes.half_width.isfinite().all():
            return None
        positive = softplus(alpha.detach().to("cpu", torch.float64))
        ends = [positive]
        for end in (slopes.mean - slopes.half_width, slopes.mean + slopes.half_width):
            ends.append(softplus(group["alpha_range"] * agreement(self.evidence, end)))
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
    return max(0.0, 1 - SHRINKAGE * noise / signal)
