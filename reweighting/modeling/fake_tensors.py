"""Models on tensors that have shapes and no memory."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def on_shapes(model: nn.Module) -> nn.Module:
    """Replace a model's tensors by ones that have shapes and no memory, but compute as if they were on the CPU.

    Autocast and checks of devices need that; on the device meta they would not work.

    Args:
        model: A model on the device meta; it is changed.

    Returns:
        The model.
    """
    fake, made = FakeTensorMode(allow_non_fake_inputs=True), {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # tied weights stay tied
            with fake:
                new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
        return made[id(tensor)]

    def replace(tensors: dict[str, Any]) -> None:
        tensors.update({name: empty(tensor) for name, tensor in tensors.items() if tensor is not None})

    for module in model.modules():
        replace(module._parameters)
        replace(module._buffers)
    return model
