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
        self._empty = True  # whether the step has no micro-batch yet

    def add(self, gradient: Sequence[Tensor]) -> None:
        """Add the gradient of a micro-batch, a tensor for each parameter."""
        if self._sum is None or self._empty:
            self._sum = flatten(gradient, self._sum)
        else:
            for total, piece in zip(unflatten(self._sum, gradient), gradient, strict=True):
                total.add_(piece)
        self._empty = False

    def take(self) -> Tensor:
        """End the step and return its gradient [P], which is valid until the next `add`."""
        if self._sum is None or self._empty:
            raise RuntimeError("the step has no micro-batch")
        self._empty = True
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
    if not pieces:
        return loss.isfinite()
    # The infinity norm is non-finite if any entry is.
    return loss.isfinite() & get_total_norm(pieces, math.inf).isfinite()
