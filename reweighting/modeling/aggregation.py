"""Aggregate a chain's step logits into one number for the whole answer; higher is better.

The meta loss, best-of-N and evaluation use the same function. With a step's score s = sigmoid(z):

    mean_logit   mean of z            = mean of log(s / (1 - s)): the published code, and the default
    sum_logit    sum of z             the paper (DreamPRM, arXiv 2505.20241)
    mean         mean of s
    min          smallest s
    max          largest s
    product      product of s
    last         s of the last step

Every aggregate is returned as a logit, so that `sigmoid(aggregate)` is the probability that the answer is correct; for
`mean`, `min`, `max`, `product` and `last` that probability is the named value itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from reweighting.modeling.config import AggregationName


def _logit_from_log_probability(log_p: Tensor) -> Tensor:
    """Compute log(p / (1 - p)) from log p without overflow at p = 0 or p = 1."""
    return log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-7)))


def _mean_logit(z: Tensor, mask: Tensor) -> Tensor:
    return z.masked_fill(~mask, 0).sum(-1) / mask.sum(-1)


def _sum_logit(z: Tensor, mask: Tensor) -> Tensor:
    return z.masked_fill(~mask, 0).sum(-1)


def _mean(z: Tensor, mask: Tensor) -> Tensor:
    log_sum = torch.logsumexp(logsigmoid(z).masked_fill(~mask, -torch.inf), -1)
    return _logit_from_log_probability(log_sum - mask.sum(-1).log())


def _min(z: Tensor, mask: Tensor) -> Tensor:
    return z.masked_fill(~mask, torch.inf).amin(-1)


def _max(z: Tensor, mask: Tensor) -> Tensor:
    return z.masked_fill(~mask, -torch.inf).amax(-1)


def _product(z: Tensor, mask: Tensor) -> Tensor:
    return _logit_from_log_probability(logsigmoid(z).masked_fill(~mask, 0).sum(-1))


def _last(z: Tensor, mask: Tensor) -> Tensor:
    return z.gather(-1, mask.sum(-1, keepdim=True) - 1).squeeze(-1)


AGGREGATIONS: dict[AggregationName, Callable[[Tensor, Tensor], Tensor]] = {
    "mean_logit": _mean_logit,
    "sum_logit": _sum_logit,
    "mean": _mean,
    "min": _min,
    "max": _max,
    "product": _product,
    "last": _last,
}


def aggregate(logits: Tensor, mask: Tensor, name: AggregationName = "mean_logit") -> Tensor:
    """Aggregate the step logits of chains.

    Args:
        logits: step logits [B, S], float.
        mask: [B, S] bool, True where a step exists; each row has at least one step, and padding comes last.
        name: an entry of `AGGREGATIONS`.

    Returns:
        The aggregates as logits, [B].

    Raises:
        KeyError: `name` is not in `AGGREGATIONS`.
    """
    return AGGREGATIONS[name](logits, mask)
