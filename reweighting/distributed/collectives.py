"""Several processes as one run: joining them, and what they tell each other.

    torchrun --nproc_per_node=4 reweighting/main.py …
    accelerate launch --multi_gpu --num_processes 4 reweighting/main.py …

Each process computes its share of every batch; all hold the same parameters and make the same steps. Whatever the
course of the run depends on is therefore the same number in all of them, to the bit: a sum over processes, or agreed
upon. With one process there is no group, and every function here gives back what it was given.

gloo carries what is on the CPU, nccl what is on CUDA. A collective may wait as long as it takes, since the main process
may be writing a large checkpoint: that the others still live is known from `rank0_output.Watch`.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from reweighting.distributed.rank0_output import GRACE, HEARING, TICK, dist_env, watch
from reweighting.errors import UserError

T = TypeVar("T")
START = timedelta(minutes=10)  # for all to come together
WAITING = timedelta(days=7)  # in a collective


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """This process among those that torchrun's environment names, as long as the context is open.

    device: where it computes, cpu or cuda with its own index. Raises UserError if they do not find each other.
    """
    rank, world, _ = dist_env()
    if world == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        stores = []
        for name, host in (("group", rank == 0 and not kept), ("watch", False)):
            store = dist.TCPStore(address, port, None, host, START, wait_for_workers=False)
            stores.append(dist.PrefixStore(f"{name}/{attempt}", store))
        dist.init_process_group(backend, store=stores[0], rank=rank, world_size=world, timeout=WAITING)
        _call(dist.barrier, device_ids=None if device.type == "cpu" else [device.index])
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"the {world} processes do not find each other: {type(error).__name__}: {error}") from error
    watching = watch(stores[1], rank, world)
    yield
    barrier()
    watching.stop()
    dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank0() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def local_slice(items: Sequence[T]) -> Sequence[T]:
    """This process's share of some items, in one piece: those of one question stand together."""
    return items[len(items) * rank() // world_size() : len(items) * (rank() + 1) // world_size()]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over processes, the same bits in all of them; a tensor of its own unless there is one process."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def all_ranks_true(tensor: Tensor) -> Tensor:
    """Where a bool tensor is true in every process."""
    return tensor if world_size() == 1 else _reduced(tensor.to(torch.uint8), dist.ReduceOp.MIN).bool()


def all_reduce_max(number: int) -> int:
    """The largest of the processes' numbers."""
    return number if world_size() == 1 else int(_reduced(torch.tensor(number), dist.ReduceOp.MAX))


def _reduced(tensor: Tensor, operation) -> Tensor:
    if world_size() == 1:
        return tensor
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    _call(dist.all_reduce, result, op=operation)
    return result


class _Summed(torch.autograd.Function):
    """Differentiable all-reduce: the backward pass sums gradients over ranks."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient)


def differentiable_all_reduce_sum(tensor: Tensor) -> Tensor:
    """`all_reduce_sum`, where each process's loss is a share of one loss, and gradients are of that one."""
    return tensor if world_size() == 1 else _Summed.apply(tensor)


def all_gather_object(value: T) -> list[T]:
    """What each process has, in their order: a small plain object."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    _call(dist.all_gather_object, values, value)
    return values


def broadcast_object(value: T) -> T:
    """What the main process has."""
    if world_size() == 1:
        return value
    values = [value]
    _call(dist.broadcast_object_list, values, src=0)
    return values[0]


def barrier() -> None:
    """Go on when every process is here."""
    all_reduce_max(0)


def broadcast_parameters(tensors: Sequence[Tensor]) -> None:
    """Make tensors what they are in the main process."""
    for tensor in tensors if world_size() > 1 else ():
        _call(dist.broadcast, tensor.detach(), src=0)


def check_same_on_all_ranks(settings: dict) -> None:
    """Raise UserError if the processes have other flags, data or backbones: their files may not be the same ones."""
    for number, (host, other) in enumerate(all_gather_object((socket.gethostname(), settings))):
        for name, value in settings.items():
            if other.get(name) != value:
                raise UserError(f"process {number} on {host} has another {name} than process {rank()}: every process "
                                "needs the same flags and files")  # fmt: skip


def _call(collective: Callable, *args, **options) -> None:
    """A collective. Raises UserError if it breaks because another process has ended; if that one has left a word, the
    watch says it first and ends this process."""
    try:
        collective(*args, **options)
    except RuntimeError as error:
        time.sleep(GRACE + 4 * TICK if rank() == 0 else HEARING)
        reason = str(error).split(". ")[0][:200]  # gloo goes on with what it guesses
        raise UserError(f"another of the {world_size()} processes has ended without a word ({reason}): --resume goes "
                        "on from the last checkpoint") from error  # fmt: skip
