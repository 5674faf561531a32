"""Many tensors as one flat vector, and back."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def flatten(tensors: Iterable[Tensor], out: Tensor | None = None) -> Tensor:
    """Concatenate all entries.

    Args:
        tensors: Tensors of any shapes, with P entries in all.
        out: A vector [P] whose memory takes the result.

    Returns:
        One vector [P], in the order of `tensors`.
    """
    return torch.cat([tensor.reshape(-1) for tensor in tensors], out=out)


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a vector [P] in the shapes of the tensors `like`."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
