"""Several processes as one command: process 0 prints, and an error is printed once.

A launcher (`torchrun`, `accelerate launch`) starts the command several times, numbers the processes and ends the others
when one fails. This module imports nothing heavy: it is loaded before anything else.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    from torch.distributed import Store

# Variables of a launcher: rank, number of processes, rank on this machine. torchrun's, and those of the MPI that
# `accelerate launch --cpu --mpirun_hostfile` starts: Open MPI, Intel MPI and MPICH, MVAPICH.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
)
REPORTED = "error reported by"  # key in the group's store: the process that printed the error
RANK0_FIRST = 10.0  # seconds that the others wait for process 0 to print the error that all have
PEER_FIRST = 2.0  # seconds that a process whose peer has ended waits for one that knows why


class DistEnv(NamedTuple):
    """The place of this process among those that a launcher has started."""

    rank: int
    world_size: int
    local_rank: int


def dist_env() -> DistEnv:
    """Read the launcher's environment variables; without a launcher, this is process 0 of 1."""
    # mpirun's variables alone start no group: N independent runs may share a batch job.
    for names in (TORCHRUN, *(MPI if "MASTER_ADDR" in os.environ else ())):
        rank, world_size, local_rank = (os.environ.get(name) for name in names)
        if rank is not None and world_size is not None and int(world_size) > 1:
            return DistEnv(int(rank), int(world_size), int(local_rank or 0))
    return DistEnv(0, 1, 0)


@contextmanager
def rank0_output() -> Generator[None]:
    """Silence stdout and stderr of every process but 0 while the context is open."""
    if dist_env().rank == 0:
        yield
        return
    nowhere = open(os.devnull, "w", encoding="utf-8")  # stays open: loggers keep the stream
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def end_process(code: int, message: str, lost: bool = False) -> NoReturn:
    """Print an error once for all processes, and end this one; its launcher then ends the others.

    Process 0 prints first, since most errors are found by all; another process adds which one it is. A process whose
    peer has ended prints only if nobody else does: not the peer itself, nor one that has found out why.

    Args:
        code: this process's exit code.
        message: what to print on stderr; empty if that has been done.
        lost: whether this process ends because another one has.
    """
    rank, world_size, _ = dist_env()
    store = _group_store()
    if lost:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which has noticed the other one meanwhile
        _wait_for_report(store, PEER_FIRST)
    elif rank > 0:
        _wait_for_report(store, RANK0_FIRST)
        message = message and f"process {rank} of {world_size} on {socket.gethostname()}: {message}"
    if message and (store is None or _is_first(store, rank)):
        print(f"\n{'error: ' if code == 2 else ''}{message}", file=sys.stderr, flush=True)  # below a progress bar
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # the process group's own end would wait for the others


def _group_store() -> "Store | None":
    """The store that the processes share once they have found each other; torchrun's outlives each of them."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return None
    store = distributed.group.WORLD.get_group_store()
    store.set_timeout(timedelta(seconds=RANK0_FIRST))
    return store


def _wait_for_report(store: "Store | None", seconds: float) -> None:
    """Wait until another process has reported an error; most often the launcher ends this one meanwhile."""
    end = time.monotonic() + seconds
    with suppress(RuntimeError):  # the store has ended with process 0
        while time.monotonic() < end and not (store is not None and store.check([REPORTED])):
            time.sleep(0.1)


def _is_first(store: "Store", rank: int) -> bool:
    """Whether no other process has reported an error. If the store has ended with process 0, the launcher reports."""
    try:
        return store.compare_set(REPORTED, "", str(rank)) == str(rank).encode()
    except RuntimeError:
        return False
