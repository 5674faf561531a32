"""A weight for each training chain, beside or instead of the domains' (DreamPRM-1.5, arXiv 2509.05542).

`instance_net.py` has a network in place of the table.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, relu, softplus

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
        """Compute the mean weight of each domain's chains, [K]."""
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
        weights: [C].
        domain_of: As for `ChainWeights`.
    """

    def __init__(self, weights: Tensor, domain_of: Tensor):
        super().__init__(domain_of)
        self.weights = nn.Buffer(weights)

    def forward(self) -> Tensor:
        """Return the weights, [C]."""
        return self.weights


class NormalizedChainWeights(ChainWeights):
    """Learned weights of chains: positive numbers, scaled.

    Args:
        domains: The K domain names, in the order of the weights.
        domain_of: As for `ChainWeights`.
        times_domain: Whether the domains have learned weights too, which the chains' are multiplied with.
    """

    def __init__(self, domains: list[str], domain_of: Tensor, times_domain: bool):
        super().__init__(domain_of)
        self.domain_weights = DomainWeights(domains) if times_domain else None

    def scaled(self, positive: Tensor, domain_of: Tensor, means: Tensor) -> Tensor:
        """Scale the numbers of some chains to their weights.

        With weights w(alpha) of the domains, a chain's weight is w_k times its number by the mean of its domain: the
        weights of a domain's chains have the mean w_k. Without, one factor makes 1 the mean of the domains' means.

        Args:
            positive: The numbers of n chains, [n].
            domain_of: Their domains, [n] int64.
            means: Of the numbers of each domain's chains, [K].

        Returns:
            [n].
        """
        if self.domain_weights is None:
            return positive / means.mean()
        return (self.domain_weights() / means)[domain_of] * positive

    def bound_(self, lowest: float, highest: float) -> None:
        """Keep the domains' weights within bounds."""
        if self.domain_weights is not None:
            self.domain_weights.bound_(lowest, highest)


class InstanceWeights(NormalizedChainWeights):
    """The table of raw parameters beta [C], all 0 at the start, so that every weight is 1.

    Args:
        domains: As for `NormalizedChainWeights`.
        domain_of: As for `ChainWeights`.
        times_domain: As for `NormalizedChainWeights`.
    """

    def __init__(self, domains: list[str], domain_of: Tensor, times_domain: bool):
        super().__init__(domains, domain_of, times_domain)
        self.beta = nn.Parameter(torch.zeros(len(domain_of)))

    def forward(self) -> Tensor:
        """Compute the weights softplus(beta), scaled, [C]."""
        positive = softplus(self.beta)  # [C]
        return self.scaled(positive, self.domain_of, self.domain_means(positive))


# The published activations, by the name that --instance_activation gives.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda raw: raw.clamp(-1.0, 3.0),
    "relu": relu,
    "leaky_relu": lambda raw: leaky_relu(raw, 0.01),
}


class PublishedInstanceWeights(ChainWeights):
    """The table as DreamPRM-1.5 publishes it: beta [C], and weights that are not scaled and may be 0 or negative.

    beta is all 0 at the start, and every weight 1. Published is the table 1 + beta: the same but for a weight decay,
    which pulls the weights to 1 here, to 0 there.

    Args:
        domain_of: As for `ChainWeights`.
        activation: A key of `ACTIVATIONS`.
    """

    def __init__(self, domain_of: Tensor, activation: str):
        super().__init__(domain_of)
        self.activation = ACTIVATIONS[activation]
        self.beta = nn.Parameter(torch.zeros(len(domain_of)))

    def forward(self) -> Tensor:
        """Compute the weights activation(1 + beta), [C]."""
        return self.activation(1 + self.beta)

    def slopes_by_domain(self, slopes: Tensor) -> Tensor:
        """Turn derivatives for the chains' weights [C] into those for adding the same to all of a domain's, [K]."""
        return self._domain_sums(slopes)
