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
