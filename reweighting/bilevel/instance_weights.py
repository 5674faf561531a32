"""A weight for each training chain, beside or instead of the domains' (DreamPRM-1.5, arXiv 2509.05542)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from reweighting.bilevel.domain_weights import DomainWeights, LossWeights


class ChainWeights(LossWeights):
    """Weights of chains, whose domains' weights are their means.

    Args:
        domain_of: The domain of each training chain, [C] int64; each of the K domains has a chain.
    """

    by_chain = True

    def __init__(self, domain_of: Tensor):
        super().__init__()
        self.domain_of = nn.Buffer(domain_of, persistent=False)
        self.sizes = nn.Buffer(torch.bincount(domain_of), persistent=False)  # [K]

    def by_domain(self) -> Tensor:
        """Compute the mean weight of each domain's chains, [K] with mean 1."""
        return self.domain_means(self())

    def slopes_by_domain(self, slopes: Tensor) -> Tensor:
        """Turn derivatives with respect to the chains' weights [C] into those for scaling a domain's weights, [K]."""
        weights = self()
        return self._domain_sums(weights * slopes) / self.domain_means(weights)

    def domain_means(self, values: Tensor) -> Tensor:
        """Compute the mean over each domain's chains of values [C], [K]."""
        return self._domain_sums(values) / self.sizes

    def _domain_sums(self, values: Tensor) -> Tensor:
        """The sum over each domain's chains of values [C], [K]."""
        return torch.zeros_like(self.sizes, dtype=values.dtype).index_add(0, self.domain_of, values)


class FixedChainWeights(ChainWeights):
    """Weights of chains that stay as they are.

    Args:
        weights: [C]; a factor makes 1 the mean of the domains' means.
        domain_of: As for `ChainWeights`.
    """

    def __init__(self, weights: Tensor, domain_of: Tensor):
        super().__init__(domain_of)
        self.weights = nn.Buffer(weights / self.domain_means(weights).mean())

    def forward(self) -> Tensor:
        """Return the weights, [C]."""
        return self.weights


class InstanceWeights(ChainWeights):
    """The table of raw parameters beta [C], all 0 at the start, so that every weight is 1.

    Args:
        domains: The K domain names, in the order of the weights.
        domain_of: As for `ChainWeights`.
        times_domain: Whether the domains have learned weights too, which the chains' are multiplied with.
    """

    def __init__(self, domains: list[str], domain_of: Tensor, times_domain: bool):
        super().__init__(domain_of)
        self.domain_weights = DomainWeights(domains) if times_domain else None
        self.beta = nn.Parameter(torch.zeros(len(domain_of)))

    def forward(self) -> Tensor:
        """Compute the weights of the chains, [C].

        With weights w(alpha) of the domains, a chain's weight is w_k softplus(beta) / (mean of it in its domain):
        the weights of a domain's chains have the mean w_k. Without, the weights are softplus(beta) but for a factor
        that makes 1 the mean of the domains' means.
        """
        positive = softplus(self.beta)  # [C]
        means = self.domain_means(positive)  # [K]
        if self.domain_weights is None:
            return positive / means.mean()
        return (self.domain_weights() / means)[self.domain_of] * positive

    def bound_(self, lowest: float, highest: float) -> None:
        """Keep the domains' weights within bounds."""
        if self.domain_weights is not None:
            self.domain_weights.bound_(lowest, highest)
