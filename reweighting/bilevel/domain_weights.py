"""The upper level's parameters: one raw number alpha a domain, and the weights that they stand for."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class DomainWeights(nn.Module):
    """The table of raw parameters alpha [K], all 0 at the start: every weight 1.

    domains: the K domain names, in the order of the weights.
    """

    def __init__(self, domains: list[str]):
        super().__init__()
        self.domains = list(domains)
        self.alpha = nn.Parameter(torch.zeros(len(domains)))

    def forward(self) -> Tensor:
        """The weights w(alpha) = softplus(alpha) / mean(softplus(alpha)), [K]: positive, mean 1."""
        positive = softplus(self.alpha)
        return positive / positive.mean()


LEAST_WEIGHT = 0.05  # a domain below takes no part any more


def collapsed(weights: dict[str, float]) -> dict[str, str]:
    """What is wrong, in words, with each domain whose weight (mean 1) has all but lost or won everything."""
    half = len(weights) / 2
    words = {}
    for domain, weight in weights.items():
        if weight < LEAST_WEIGHT:
            words[domain] = f"{domain} has all but no weight ({weight:.3f})"
        elif weight > half and len(weights) > 2:  # of two domains, one always has half or more
            words[domain] = f"{domain} has more than half of all the weight ({weight:.2f} of {len(weights)})"
    return words
