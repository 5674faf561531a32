"""How a model's parameters lie on the processes: whole on each of them, or cut into parts.

    Replicated   every process holds all parameters. A process's gradient is of its share of a batch: the gradient is
                 their sum.
    Sharded      torch's `fully_shard` (FSDP2): a process holds a part of each parameter, gathers a layer's when it is
                 computed, and gets its part of the gradient of the whole batch.

Both give the levels the same things: named local tensors to optimize and flat vectors [P] over them. Where vectors are
parts, elementwise arithmetic needs nothing; norms and dot products are summed over processes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from reweighting.distributed import collectives
from reweighting.distributed.flat_vectors import flatten, unflatten


class Replicated:
    """Every process holds the module whole; with one process, the module as it is."""

    def __init__(self, module: nn.Module):
        self.module = module

    def trainables(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of those that are not frozen."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def local_gradient(self, loss: Tensor, out: Tensor | None = None) -> Tensor:
        """The gradient [P] of this process's share of a loss; in the memory of `out` if that is given."""
        params = list(self.trainables().values())
        return flatten(torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True), out)

    def reduce_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient [P] of the whole loss from the one of this process's share; the same tensor if that is it."""
        return collectives.all_reduce_sum(gradient)

    def norm(self, gradient: Tensor) -> float:
        """The norm of a gradient that is the same, or cut into parts, in all processes."""
        return gradient.norm().item()

    def gather_full(self, name: str, tensor: Tensor) -> Tensor:
        """What is kept of the named parameter (itself, a moment) as a tensor of its whole shape, in the main process;
        every process calls it."""
        return tensor

    def local_shard(self, name: str, tensor: Tensor) -> Tensor:
        """This process's part of what `gather_full` gave."""
        return tensor

    def gather_full_vector(self, vector: Tensor) -> Tensor:
        """`gather_full`, of a vector [P]."""
        return vector

    def local_shard_vector(self, vector: Tensor) -> Tensor:
        """`local_shard`, of a vector [P]."""
        return vector

    def gather_local_gradient(self, vector: Tensor) -> Tensor:
        """The processes' shares of a gradient, together."""
        return collectives.all_reduce_sum(vector)

    def split_local_gradient(self, vector: Tensor) -> Tensor:
        """A share for each process that together make the gradient; the same tensor if this one's is all of it."""
        return vector if collectives.world_size() == 1 else vector * float(collectives.is_rank0())

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """The whole of a module that is cut into parts, in the main process; None where the module has it."""
        return None


def uncut_parameters(module: nn.Module, language_model: nn.Module) -> set[nn.Parameter]:
    """Those that `Sharded` leaves whole on every process: what is frozen outside of the language model."""
    inside = set(language_model.parameters())
    return {param for param in module.parameters() if not param.requires_grad and param not in inside}


class Sharded(Replicated):
    """Cuts every parameter into parts along its first dimension, one for each process, and moves the parts to `device`.

    layers: the modules that are gathered one at a time; the rest is gathered as a whole. Frozen parameters outside of
    `language_model` stay whole: the vision tower works whenever one process meets an image, which others may not.
    A pass of one process is one of all, so that all make as many: see `samplers.small_batches`.
    """

    def __init__(self, module: nn.Module, language_model: nn.Module, layers: Iterable[nn.Module], device: torch.device):
        super().__init__(module)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.mesh = init_device_mesh(device.type, (collectives.world_size(),))
        uncut = uncut_parameters(module, language_model)
        for param in uncut:
            param.data = param.data.to(device)
        for unit in (*layers, module):
            # Nothing is kept from one pass to the next: after an optimizer step it would be stale.
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, ignored_params=uncut)
            unit.set_gradient_divide_factor(1.0)  # the processes' losses add up
            unit.set_force_sum_reduction_for_comms(True)
        module.set_reduce_scatter_unused_params(True)  # the vision tower's, in a batch without images
        self.cut = super().trainables()
        with torch.no_grad():  # what the optimizer changes is the parts' own memory
            self.local = {name: nn.Parameter(param.to_local()) for name, param in self.cut.items()}

    def trainables(self) -> dict[str, nn.Parameter]:
        """{name: the part that is here} of the parameters that are not frozen."""
        return self.local

    def local_gradient(self, loss: Tensor, out: Tensor | None = None) -> Tensor:
        """The part that is here of the gradient of all processes' losses together."""
        loss.backward()  # `autograd.grad` would pass by the hooks that sum over processes
        pieces = []
        for param, local in zip(self.cut.values(), self.local.values(), strict=True):
            pieces.append(torch.zeros_like(local) if param.grad is None else param.grad.to_local())
            param.grad = None
        return flatten(pieces, out)

    def reduce_gradient(self, gradient: Tensor) -> Tensor:
        """The same: the backward pass has summed it."""
        return gradient

    def norm(self, gradient: Tensor) -> float:
        """From the parts of all processes."""
        return collectives.all_reduce_sum(gradient.square().sum()).sqrt().item()

    def gather_full(self, name: str, tensor: Tensor) -> Tensor:
        """In main memory, so that the main process's GPU need not hold it all."""
        return self._gathered(tensor, self.cut[name])

    def _gathered(self, tensor: Tensor, like) -> Tensor:
        """A tensor cut as the DTensor `like`, whole in the main process; elsewhere the part that is here."""
        shape, stride = like.shape, like.stride()
        cut = type(like).from_local(tensor, self.mesh, like.placements, run_check=False, shape=shape, stride=stride)
        whole = cut.full_tensor()
        return whole.cpu() if collectives.is_rank0() else tensor

    def local_shard(self, name: str, tensor: Tensor) -> Tensor:
        """Cut as torch cuts parameters: into chunks of one size, the last ones smaller or empty."""
        if tensor.shape != self.cut[name].shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)} in it and {tuple(self.cut[name].shape)} here")
        chunks = tensor.chunk(collectives.world_size())
        return (chunks[collectives.rank()] if collectives.rank() < len(chunks) else tensor[:0]).clone()

    def gather_full_vector(self, vector: Tensor) -> Tensor:
        """`gather_full` of each parameter's entries, one behind the other."""
        pieces = zip(self.local, unflatten(vector, list(self.local.values())), strict=True)
        return flatten([self.gather_full(name, piece) for name, piece in pieces])

    def local_shard_vector(self, vector: Tensor) -> Tensor:
        """`local_shard` of each parameter's entries, one behind the other."""
        pieces = zip(self.cut, vector.split([param.numel() for param in self.cut.values()]), strict=True)
        return flatten([self.local_shard(name, piece.view(self.cut[name].shape)) for name, piece in pieces])

    def gather_local_gradient(self, vector: Tensor) -> Tensor:
        """A part of a gradient is of all processes' batches."""
        return self.gather_full_vector(vector)

    def split_local_gradient(self, vector: Tensor) -> Tensor:
        """A part of a gradient is of all processes' batches."""
        return vector

    def full_state_dict(self) -> dict[str, Tensor]:
        """The module's whole state, in the main process; every process calls it."""
        state = self.module.state_dict()
        return {
            name: self._gathered(value.to_local(), value) if hasattr(value, "placements") else value
            for name, value in state.items()
        }
