"""Many tensors as one flat vector, and back."""

import torch
from torch import Tensor


def flatten(tensors, out: Tensor | None = None) -> Tensor:
    """One vector [P] of all entries, in order; in the memory of `out` if that is given."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors], out=out)


def unflatten(vector: Tensor, like) -> list[Tensor]:
    """Views of a vector [P] in the shapes of the tensors `like`."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]
