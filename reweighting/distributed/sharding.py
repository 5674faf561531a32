"""How the parameters of a model lie on the processes: replicated on each, or sharded over them.

    Replicated   every process holds all parameters. A process's gradient is of its part of a batch; the gradient is
                 their sum.
    Sharded      torch's `fully_shard` (FSDP2): a process holds a shard of each parameter, gathers a layer when it is
                 computed, and gets its shard of the gradient of the whole batch.

Both offer the levels the same: named local tensors to optimize, and flat vectors [P] over them. Elementwise arithmetic
on such vectors is local; norms and dot products of sharded ones are summed over processes.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from reweighting.distributed import collectives
from reweighting.distributed.flat_vectors import flatten, unflatten

if TYPE_CHECKING:  # slow to import
    from torch.distributed.tensor import DTensor


class Replicated:
    """Every process holds all parameters of the module; with one process, the module as it is.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def partial_gradients(self) -> bool:
        """Whether a process's gradient is of its part of a batch only."""
        return collectives.world_size() > 1

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return {name: parameter} of those that are not frozen."""
        return {name: param for name, param in self.module.named_parameters() if param.requires_grad}

    def local_gradient(self, loss: Tensor) -> list[Tensor]:
        """Return the gradient of this process's part of a loss, a tensor for each trainable parameter."""
        params = list(self.trainable_parameters().values())
        return list(torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True))

    def reduce_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient [P] of the whole loss from this process's; the same tensor where it is that already."""
        return collectives.all_reduce_sum(gradient)

    def norm(self, gradient: Tensor) -> float:
        """Return the norm of a reduced gradient [P]."""
        return gradient.norm().item()

    def gather_full(self, name: str, tensor: Tensor) -> Tensor:
        """Gather a tensor that lies like the named parameter (itself, a moment) on rank 0; every process calls it."""
        return tensor

    def local_shard(self, name: str, tensor: Tensor) -> Tensor:
        """Return this process's shard of what `gather_full` returned."""
        return tensor

    def gather_full_vector(self, vector: Tensor) -> Tensor:
        """Gather a vector [P], parameter by parameter, on rank 0."""
        return vector

    def local_shard_vector(self, vector: Tensor) -> Tensor:
        """Return this process's shard of what `gather_full_vector` returned."""
        return vector

    def gather_local_gradient(self, vector: Tensor) -> Tensor:
        """Return the gradient [P] that the processes' local gradients make together, on rank 0."""
        return collectives.all_reduce_sum(vector)

    def split_local_gradient(self, vector: Tensor) -> Tensor:
        """Return local gradients [P] that together make a gradient [P]: all of it on rank 0, 0 elsewhere."""
        return vector if collectives.world_size() == 1 else vector * float(collectives.is_rank0())

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """Return the full state of a sharded module on rank 0; None where the module itself has it."""
        return None


def unsharded_parameters(module: nn.Module, language_model: nn.Module) -> set[nn.Parameter]:
    """Find the parameters that `Sharded` replicates: frozen ones outside of the language model."""
    inside = set(language_model.parameters())
    return {param for param in module.parameters() if not param.requires_grad and param not in inside}


class Sharded(Replicated):
    """Shards every parameter along its first dimension and moves the shards to the device.

    Frozen parameters outside of the language model are replicated: the vision tower runs whenever one process meets an
    image, which others may not. A pass of one process is one of all, so that all make as many passes, see
    `samplers.small_batches`.

    Args:
        module: The module.
        language_model: The part of it whose frozen parameters are sharded too.
        layers: The modules that are gathered one at a time; the rest is gathered as a whole.
        device: Where this process computes.
    """

    def __init__(self, module: nn.Module, language_model: nn.Module, layers: Iterable[nn.Module], device: torch.device):
        super().__init__(module)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.mesh = init_device_mesh(device.type, (collectives.world_size(),))
        unsharded = unsharded_parameters(module, language_model)
        for param in unsharded:
            param.data = param.data.to(device)
        for unit in (*layers, module):
            # Reshard after each pass: a gathered parameter is stale after an optimizer step.
            sharded = fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, ignored_params=unsharded)
            sharded.set_gradient_divide_factor(1.0)  # the processes' losses add up
            sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_reduce_scatter_unused_params(True)  # the module's: the vision tower, in a batch without images
        self.sharded = cast("dict[str, DTensor]", super().trainable_parameters())
        with torch.no_grad():  # the optimizer changes the shards' own memory
            self.shards = {name: nn.Parameter(param.to_local()) for name, param in self.sharded.items()}

    @property
    def partial_gradients(self) -> bool:
        """Return False: the backward pass sums over processes."""
        return False

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return {name: this process's shard} of the parameters that are not frozen."""
        return self.shards

    def local_gradient(self, loss: Tensor) -> list[Tensor]:
        """Return this process's shard of the gradient of all processes' losses together."""
        loss.backward()  # `autograd.grad` would bypass the hooks that sum over processes
        pieces = []
        for param, shard in zip(self.sharded.values(), self.shards.values(), strict=True):
            pieces.append(torch.zeros_like(shard) if param.grad is None else cast("DTensor", param.grad).to_local())
            param.grad = None
        return pieces

    def reduce_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient as it is: the backward pass has summed it."""
        return gradient

    def norm(self, gradient: Tensor) -> float:
        """Return the norm from the shards of all processes."""
        return collectives.all_reduce_sum(gradient.square().sum()).sqrt().item()

    def gather_full(self, name: str, tensor: Tensor) -> Tensor:
        """Gather in main memory, so that rank 0's GPU need not hold all of it."""
        return self._gather(tensor, self.sharded[name])

    def _gather(self, tensor: Tensor, like: "DTensor") -> Tensor:
        """A tensor sharded as the DTensor `like`, in full on rank 0; elsewhere the shard."""
        shape, stride = like.shape, like.stride()
        sharded = type(like).from_local(tensor, self.mesh, like.placements, run_check=False, shape=shape, stride=stride)
        full = sharded.full_tensor()
        return full.cpu() if collectives.is_rank0() else tensor

    def local_shard(self, name: str, tensor: Tensor) -> Tensor:
        """Return this process's shard, cut as torch does: chunks of one size, the last ones smaller or empty."""
        if tensor.shape != self.sharded[name].shape:
            expected = tuple(self.sharded[name].shape)
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)} in it and {expected} here")
        chunks = tensor.chunk(collectives.world_size())
        return (chunks[collectives.rank()] if collectives.rank() < len(chunks) else tensor[:0]).clone()

    def gather_full_vector(self, vector: Tensor) -> Tensor:
        """Gather each parameter's entries of a vector [P of this process]."""
        pieces = zip(self.shards, unflatten(vector, list(self.shards.values())), strict=True)
        return flatten([self.gather_full(name, piece) for name, piece in pieces])

    def local_shard_vector(self, vector: Tensor) -> Tensor:
        """Return this process's shard of each parameter's entries."""
        pieces = zip(self.sharded.items(), unflatten(vector, list(self.sharded.values())), strict=True)
        return flatten([self.local_shard(name, piece) for (name, _), piece in pieces])

    def gather_local_gradient(self, vector: Tensor) -> Tensor:
        """Gather the shards: each is of all processes' batches."""
        return self.gather_full_vector(vector)

    def split_local_gradient(self, vector: Tensor) -> Tensor:
        """Return the shard: it is of all processes' batches."""
        return vector

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the module's full state on rank 0; every process calls it."""
        state = self.module.state_dict()
        return {
            name: self._gather(value.to_local(), value) if hasattr(value, "placements") else value
            for name, value in state.items()
        }
