"""Several processes in tests: forked, so that they need not import everything again."""

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from reweighting import main
from reweighting.distributed import collectives
from reweighting.entrypoint import run_command
from reweighting.training import build, loss_weights


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Launched:
    """Processes that each do `work` in the environment that torchrun gives them; nobody ends them when one fails.

    output: the file that takes what they print; None to leave it.
    """

    def __init__(self, world: int, work: Callable[[], None], output: Path | None = None):
        self.output, port = output, free_port()
        self.store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)  # outlives the processes
        environment = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }

        def begin(rank: int) -> None:
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            if output is not None:
                sys.stdout = sys.stderr = sys.__stderr__ = open(output, "a", buffering=1)
            work()

        fork = multiprocessing.get_context("fork")
        self.processes = [fork.Process(target=begin, args=(rank,)) for rank in range(world)]
        # A store that a child collects as garbage waits for ever for its thread, which a fork does not take along.
        gc.collect()
        gc.freeze()
        for process in self.processes:
            process.start()
        gc.unfreeze()

    def exit_codes(self, seconds: float = 120) -> list[int]:
        """Wait for the first of them so long, and for the others 20 s more; kill those that are left."""
        for process, patience in zip(self.processes, [seconds] + [20] * len(self.processes), strict=False):
            process.join(patience)
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def printed(self) -> str:
        return self.output.read_text()


def run_processes(world: int, work: Callable[[], None]) -> list[int]:
    """The exit codes of processes that do `work`; of one process, it is done here."""
    if world == 1:
        work()
        return [0]
    return Launched(world, work).exit_codes()


def command(flags: list[str]) -> None:
    """The command from beginning to end, with its exit code."""
    sys.argv = ["main.py", *flags]
    run_command("reweighting.main")


def parameters_of(flags: list[str], place: Path, double: bool = False) -> Callable[[], None]:
    """Work that runs the command and leaves each process's parameters at its end in `place`."""

    def work() -> None:
        finish, load_backbone, table = main.save_results, build.load_backbone, loss_weights.make_learned_weights

        def note(engine, *args) -> None:
            torch.save(engine.lower.named_trainable_parameters(), place / f"{collectives.rank()}.pt")
            finish(engine, *args)

        try:
            main.save_results = note
            if double:
                build.load_backbone = lambda *args: load_backbone(*args).double()
                loss_weights.make_learned_weights = lambda *args: table(*args).double()
            main.main(flags)
        finally:
            main.save_results, build.load_backbone, loss_weights.make_learned_weights = finish, load_backbone, table

    place.mkdir(exist_ok=True)
    return work


def left(place: Path) -> list[dict[str, Tensor]]:
    """What `parameters_of` left, by process."""
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(len(list(place.iterdir())))]
