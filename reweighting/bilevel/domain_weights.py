"""The upper level's parameters: a raw number alpha for each domain, and the weights w(alpha).

`instance_weights.py` adds weights of single chains.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from reweighting.modeling.collate import Batch

MIN_WEIGHT = 0.05  # a domain below hardly takes part any more


class LossWeights(nn.Module):
    """What the losses of the lower level are multiplied with: one weight for each domain, or one for each chain.

    Attributes:
        by_chain: Whether there is one for each chain.
    """

    by_chain = False
    _held: Tensor | None = None

    def forward(self) -> Tensor:
        """Compute the weights: of the domains, [K], or of the chains, [C]."""
        raise NotImplementedError

    def held(self) -> Tensor:
        """Return the weights without a graph; they are computed once between two updates."""
        if self._held is None:
            with torch.no_grad():
                self._held = self().detach()  # no buffer, where the weights are one
        return self._held

    def of_chains(self, batch: Batch, errors: Tensor) -> Tensor:
        """Return the weights of the chains of a micro-batch, without a graph; only where `by_chain`.

        Args:
            batch: Training chains.
            errors: Loss of each step, [B, S] without a graph; here, it changes nothing.

        Returns:
            [B].
        """
        return self.held()[batch.chain_ids]

    def begin_window(self) -> None:
        """Note that an update has changed the parameters."""
        self._held = None

    def observations(self) -> dict[str, Tensor]:
        """Return a copy of what the weights depend on besides the parameters; here, nothing."""
        return {}

    def load_observations(self, observations: dict[str, Tensor]) -> None:
        """Continue from what `observations` gave, with parameters that were loaded."""
        self._held = None

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the parameters for an optimizer."""
        return [{"params": list(self.parameters()), "lr": learning_rate}]

    def by_domain(self) -> Tensor:
        """Compute the weights of the domains, [K] with mean 1: what is reported."""
        return self()

    def slopes_by_domain(self, slopes: Tensor) -> Tensor:
        """Turn derivatives with respect to the weights into those with respect to the domains' weights, [K]."""
        return slopes

    def bound_(self, lowest: float, highest: float) -> None:
        """Keep the domains' weights within bounds; here, there is nothing to move."""


class FixedWeights(LossWeights):
    """Weights of the domains that stay as they are.

    Args:
        weights: [K], with mean 1.
    """

    def __init__(self, weights: Tensor):
        super().__init__()
        self.weights = nn.Buffer(weights)

    def forward(self) -> Tensor:
        """Return the weights, [K]."""
        return self.weights


class DomainWeights(LossWeights):
    """The table of raw parameters alpha [K], all 0 at the start, so that every weight is 1.

    Args:
        domains: The K domain names, in the order of the weights.
    """

    def __init__(self, domains: list[str]):
        super().__init__()
        self.domains = list(domains)
        self.alpha = nn.Parameter(torch.zeros(len(domains)))

    def forward(self) -> Tensor:
        """Compute the weights w(alpha) = softplus(alpha) / mean(softplus(alpha)), [K]: positive, with mean 1."""
        positive = softplus(self.alpha)
        # Through the differences, so that equal numbers give exactly 1: the float32 mean of 30 of them is off by 1e-7.
        return positive / (positive[0] + (positive - positive[0]).mean())

    @torch.no_grad()
    def bound_(self, lowest: float, highest: float) -> None:
        """Move alpha to where no weight is below `lowest` or above `highest`; weights within are scaled alike.

        Args:
            lowest: At least 0 and at most 1.
            highest: At least 1; infinite for no bound.
        """
        weights = self()
        if not (weights.min() < lowest or weights.max() > highest):
            return
        bounded = bound_weights(weights.to("cpu", torch.float64), lowest, highest)
        positive = (bounded * softplus(self.alpha).mean().item()).clamp(min=1e-30)
        self.alpha.copy_(positive + torch.log(-torch.expm1(-positive)))  # softplus backwards


def bound_weights(weights: Tensor, lowest: float, highest: float) -> Tensor:
    """Clamp weights [K] to bounds around 1, scaled before by the factor that leaves their mean 1."""
    low, high = 0.0, 1 / weights.clamp(min=1e-30).min().item()  # factors: the mean of the clamped weights is monotone
    for _ in range(100):
        factor = (low + high) / 2
        if (factor * weights).clamp(lowest, highest).mean() < 1:
            low = factor
        else:
            high = factor
    return (high * weights).clamp(lowest, highest)


def collapsed(weights: dict[str, float]) -> dict[str, str]:
    """Find the domains whose weight has lost or won nearly everything.

    Args:
        weights: {domain: weight}.

    Returns:
        {domain: a message about its weight}.
    """
    total = sum(weights.values())
    words = {}
    for domain, weight in weights.items():
        if weight < 0:
            words[domain] = f"the weight of {domain} is negative ({weight:.2f})"
        elif weight < MIN_WEIGHT:
            words[domain] = f"the weight of {domain} has nearly vanished ({weight:.3f})"
        elif weight > total / 2 > 0 and len(weights) > 2:  # of two domains, one always has half or more
            words[domain] = f"{domain} has more than half of the total weight ({weight:.2f} of {total:.3g})"
    return words
