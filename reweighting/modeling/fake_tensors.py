"""Models on tensors that have shapes and no memory."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def on_shapes(model: nn.Module) -> nn.Module:
    """The model, made on the meta device, with tensors in the place of its own that compute as if they were on the CPU
    (autocast and checks of devices need that) and have no memory either."""
    fake, made = FakeTensorMode(allow_non_fake_inputs=True), {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # tied weights stay tied
            with fake:
                new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
        return made[id(tensor)]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: empty(tensor) for name, tensor in own.items() if tensor is not None})
    return model
