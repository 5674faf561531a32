"""The gradient of an optimizer step, summed over its micro-batches."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn.utils import get_total_norm

from reweighting.distributed.flat_vectors import flatten, unflatten


class StepGradient:
    """Sums the gradients of a step's micro-batches, in memory that is allocated once."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None  # [P]
        self._count = 0  # micro-batches of the step so far

    def add(self, gradient: Sequence[Tensor]) -> None:
        """Add the gradient of a micro-batch, a tensor for each parameter."""
        if self._count == 0:
            self._sum = flatten(gradient, self._sum)
        else:
            for total, piece in zip(unflatten(self._sum, gradient), gradient, strict=True):
                total.add_(piece)
        self._count += 1

    def take(self) -> Tensor:
        """End the step and return its gradient [P], which is valid until the next `add`."""
        self._count = 0
        return self._sum


def is_finite(loss: Tensor, gradient: Sequence[Tensor]) -> Tensor:
    """Tell whether a loss and its gradient are finite, without waiting for the device.

    Args:
        loss: A scalar.
        gradient: Of the loss, a tensor for each parameter; empty ones where a process holds no part of a parameter.

    Returns:
        A bool scalar on the loss's device.
    """
    pieces = [piece for piece in gradient if piece.numel()]
    finite = loss.isfinite()
    # The infinity norm is non-finite if any entry is.
    return finite & get_total_norm(pieces, math.inf).isfinite() if pieces else finite
