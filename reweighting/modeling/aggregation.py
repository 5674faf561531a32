"""Step logits of a chain -> one number for the whole answer; higher is better.

The same function serves the meta loss, best-of-N and evaluation. With a step's score s = sigmoid(z):

    mean_logit   mean of z            = mean of log(s / (1 - s)): the published code, and the default
    sum_logit    sum of z             the paper (DreamPRM, arXiv 2505.20241)
    mean         mean of s
    min          smallest s
    max          largest s
    product      product of s
    last         s of the last step

Every aggregate is returned as a logit, so that `sigmoid(aggregate)` is a probability that the answer is right; for
`mean`, `min`, `max`, `product` and `last` that probability is the named value itself.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def _logit_of_log(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, safe at both ends."""
    return log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-7)))


def _mean_logit(z: Tensor, mask: Tensor) -> Tensor:
    return z.masked_fill(~mask, 0).sum(-1) / mask.sum(-1)


def _sum_logit(z: Tensor, mask: Tensor) -> Tensor:
    return z.masked_fill(~mask, 0).sum(-1)


def _mean(z: Tensor, mask: Tensor) -> Tensor:
    log_sum = torch.logsumexp(logsigmoid(z).masked_fill(~mask, -torch.inf), -1)
    return _logit_of_log(log_sum - mask.sum(-1).log())


def _min(z: Tensor, mask: Tensor) -> Tensor:
    return z.masked_fill(~mask, torch.inf).amin(-1)


def _max(z: Tensor, mask: Tensor) -> Tensor:
    return z.masked_fill(~mask, -torch.inf).amax(-1)


def _product(z: Tensor, mask: Tensor) -> Tensor:
    return _logit_of_log(logsigmoid(z).masked_fill(~mask, 0).sum(-1))


def _last(z: Tensor, mask: Tensor) -> Tensor:
    return z.gather(-1, mask.sum(-1, keepdim=True) - 1).squeeze(-1)


AggregationName = Literal["mean_logit", "sum_logit", "mean", "min", "max", "product", "last"]
AGGREGATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean_logit": _mean_logit,
    "sum_logit": _sum_logit,
    "mean": _mean,
    "min": _min,
    "max": _max,
    "product": _product,
    "last": _last,
}


def aggregate(logits: Tensor, mask: Tensor, name: str = "mean_logit") -> Tensor:
    """Aggregate the step logits of chains.

    logits: [B, S] float. mask: [B, S] bool, True where a step exists: at least one a row, steps first.
    Returns [B], the aggregates as logits. Raises KeyError for a name that is not in AGGREGATIONS.
    """
    return AGGREGATIONS[name](logits, mask)
