"""Several processes as one run, on accelerate's `PartialState`: joining them, and what they exchange.

    torchrun --nproc_per_node=4 reweighting/main.py …
    accelerate launch --multi_gpu --num_processes 4 reweighting/main.py …

Each process computes its share of every batch; all hold the same parameters and make the same steps. Every number that
decides the course of the run is therefore the same in all of them, bit for bit: it is reduced over the processes. With
one process there is no group, and every function returns its argument.

gloo carries CPU tensors and objects, nccl CUDA tensors. A process that waits longer than the group's timeout ends with
a `UserError`, and one whose peer has ended with `ProcessLost`; the launcher then ends the rest.
"""

import socket
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object, reduce
from torch import Tensor

from reweighting.distributed.rank0_output import dist_env
from reweighting.errors import ProcessLost, UserError

T = TypeVar("T")


@contextmanager
def process_group(device: torch.device, timeout_minutes: float) -> Generator[None]:
    """Join the processes that the launcher has started, as long as the context is open.

    Args:
        device: where this process computes: cpu, or cuda with the index of its own GPU.
        timeout_minutes: how long a process waits for the others, at the start and in each collective.

    Raises:
        UserError: if the processes do not find each other, or one does not answer in time.
        ProcessLost: if another process has ended.
    """
    world = dist_env().world_size
    if world == 1:
        yield
        return
    on_cpu = device.type == "cpu"
    backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
    try:
        state = PartialState(cpu=on_cpu, backend=backend, timeout=timedelta(minutes=timeout_minutes))
    except (ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"the {world} processes do not find each other: {type(error).__name__}: {error}") from error
    with _noticing_lost_processes():
        state.wait_for_everyone()
        yield
        state.wait_for_everyone()
    state.destroy_process_group()


@contextmanager
def _noticing_lost_processes() -> Generator[None]:
    """Name what the backends raise when another process hangs (UserError) or has ended (ProcessLost)."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if not isinstance(error, dist.DistError) and "gloo/transport" not in message:
            raise
        reason = message.rpartition("] ")[2].split(". ")[0][:200]  # without gloo's file name and its guesses
        hangs = "timed out" in message.lower()
        found = "does not answer within --distributed_timeout" if hangs else "has ended"
        trouble = (
            f"another of the {world_size()} processes {found} ({reason}): --resume resumes from the last checkpoint"
        )
        raise (UserError if hangs else ProcessLost)(trouble) from error


def rank() -> int:
    """Return this process's number, from 0."""
    return PartialState().process_index if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return PartialState().num_processes if dist.is_initialized() else 1


def is_rank0() -> bool:
    """Return whether this process is the one that prints and writes."""
    return rank() == 0


def local_slice(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of some items: consecutive ones, since those of one question are neighbours."""
    return items[len(items) * rank() // world_size() : len(items) * (rank() + 1) // world_size()]


@_noticing_lost_processes()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over processes: the same bits in all of them, in a new tensor unless there is one process."""
    return reduce(tensor.detach().contiguous(), "sum") if world_size() > 1 else tensor


@_noticing_lost_processes()
def all_ranks_true(tensor: Tensor) -> Tensor:
    """Return where a bool tensor is true in every process."""
    return reduce((~tensor).to(torch.uint8), "max") == 0 if world_size() > 1 else tensor


@_noticing_lost_processes()
def all_reduce_max(number: int) -> int:
    """Return the largest of the processes' numbers."""
    return int(reduce(torch.tensor(number), "max")) if world_size() > 1 else number


class _Summed(torch.autograd.Function):
    """Differentiable all-reduce: the backward pass sums gradients over ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce_sum(gradients[0])


def differentiable_all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over processes; the backward pass sums its gradient, as each process has its share of one loss."""
    return tensor if world_size() == 1 else _Summed.apply(tensor)


@_noticing_lost_processes()
def all_gather_object(value: T) -> list[T]:
    """Return every process's value, in the order of their numbers: small objects that pickle."""
    return gather_object([value]) if world_size() > 1 else [value]


@_noticing_lost_processes()
def broadcast_object(value: T) -> T:
    """Return process 0's value."""
    return broadcast_object_list([value])[0] if world_size() > 1 else value


@_noticing_lost_processes()
def broadcast_parameters(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with process 0's."""
    if world_size() > 1:
        broadcast([tensor.detach() for tensor in tensors])


@_noticing_lost_processes()
def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        PartialState().wait_for_everyone()


def check_same_on_all_ranks(settings: dict[str, Any]) -> None:
    """Check that all processes have the same flags, data and backbone: their files may not be the same ones.

    Raises:
        UserError: on every process that differs from another one; names that one's host and the setting.
    """
    for number, (host, other) in enumerate(all_gather_object((socket.gethostname(), settings))):
        for name, value in settings.items():
            if other.get(name) != value:
                raise UserError(f"process {number} on {host} has another {name} than process {rank()}: every process "
                                "needs the same flags and files")  # fmt: skip
