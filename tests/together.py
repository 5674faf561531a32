"""Several processes in tests: forked, so that they need not import everything again."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reweighting import main
from reweighting.distributed import collectives
from reweighting.entrypoint import run_command
from reweighting.training import build


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(world: int, work: Callable[[], None], words: Path | None = None) -> list[multiprocessing.Process]:
    """Processes that each do `work` as torchrun would have started them; what they say goes into `words`."""
    address = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}

    def begin(rank: int) -> None:
        os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
        if words is not None:
            sys.stdout = sys.stderr = sys.__stderr__ = open(words, "a", buffering=1)
        work()

    started = [multiprocessing.get_context("fork").Process(target=begin, args=(rank,)) for rank in range(world)]
    for process in started:
        process.start()
    return started


def together(world: int, work: Callable[[], None], seconds: float = 120) -> list[int]:
    """The exit codes of processes that do `work`; in one process, it is done here."""
    if world == 1:
        work()
        return [0]
    started = start(world, work)
    for process in started:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def told(world: int, work: Callable[[], None], place: Path) -> tuple[list[int], str]:
    """The exit codes of processes that do `work`, and what they say, by way of a file at `place`. When the main one has
    ended, the others have a few seconds."""
    started = start(world, work, place)
    for process, seconds in zip(started, [60] + [15] * world, strict=False):
        process.join(seconds)
    for process in started:
        process.kill()
        process.join()
    return [process.exitcode for process in started], place.read_text()


def command(flags: list[str]) -> None:
    """The command from beginning to end, with its exit code."""
    sys.argv = ["main.py", *flags]
    run_command("reweighting.main")


def parameters_of(flags: list[str], place: Path, double: bool = False) -> Callable[[], None]:
    """Work that runs the command and leaves each process's parameters at its end in `place`."""

    def work() -> None:
        finish, load_backbone, table = main.save_results, build.load_backbone, main.DomainWeights

        def note(engine, folder) -> None:
            torch.save(engine.lower.named_trainables(), place / f"{collectives.rank()}.pt")
            finish(engine, folder)

        try:
            main.save_results = note
            if double:
                build.load_backbone = lambda *args: load_backbone(*args).double()
                main.DomainWeights = lambda domains: table(domains).double()
            main.main(flags)
        finally:
            main.save_results, build.load_backbone, main.DomainWeights = finish, load_backbone, table

    place.mkdir(exist_ok=True)
    return work


def left(place: Path) -> list[dict[str, Tensor]]:
    """What `parameters_of` left, by process."""
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(len(list(place.iterdir())))]
