"""The real command under torchrun and `accelerate launch`: a fault in one process ends all, with one error in the
output that says what happened."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reweighting.main import main
from tests.processes import free_port
from tests.runs import ROOT, history, without_times

MAIN = str(ROOT / "reweighting" / "main.py")
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc_per_node=2", "--shutdown_timeout=3", "--master_port"),
    "accelerate": (
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port",
    ),
}  # fmt: skip
REFUSED = """
import sys
sys.path[0] = {root!r}
from reweighting.entrypoint import run_command
from reweighting.errors import UserError
from reweighting.distributed.collectives import rank
from reweighting.training.engine import ReweightingEngine

prepare = ReweightingEngine._prepare_step
def strike(self):
    if rank() == 1 and self.global_step == 3:
        raise UserError("train.json: row 3: out of luck")
    return prepare(self)

ReweightingEngine._prepare_step = strike
run_command("reweighting.main")
"""


def launch(launcher: str, script: str, flags: list[str], strike: Callable[[list[int]], None]) -> tuple[str, float]:
    """Run a script in two processes; when the first window is trained, `strike` gets their ids.

    Returns what all of them print, and the seconds from the strike to the end.
    """
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(free_port()), script, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    history_file = Path(flags[flags.index("--weights_path") + 1]) / "history.jsonl"
    while process.poll() is None and not (history_file.exists() and history_file.read_text()):
        time.sleep(0.02)
    struck = time.monotonic()
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        strike(sorted(map(int, children)))  # started in the order of their ranks
    printed = process.communicate(timeout=100)[0]
    assert process.returncode == 1
    return printed, time.monotonic() - struck


def root_cause(printed: str) -> str:
    """The part of torchrun's report that names the first failure."""
    return printed.partition("Root Cause (first observed failure)")[2]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_others_with_one_error(tiny, tmp_path, rank):
    run = tiny(tmp_path / "run", "--iteration_num", "2000")
    printed, seconds = launch("torchrun", MAIN, run, lambda pids: os.kill(pids[rank], signal.SIGKILL))
    print(f"ended {seconds:.1f} s after process {rank} was killed")
    assert seconds < 60
    assert printed.count("error: ") == 1 and "error: another of the 2 processes has ended (" in printed, printed
    assert f"rank      : {rank}" in root_cause(printed) and "Signal 9 (SIGKILL) received by PID" in root_cause(printed)


@pytest.mark.slow
def test_a_frozen_process_ends_all_after_the_timeout(tiny, tmp_path):
    run = tiny(tmp_path / "run", "--iteration_num", "2000", "--distributed_timeout", "0.25")
    printed, seconds = launch("torchrun", MAIN, run, lambda pids: os.kill(pids[1], signal.SIGSTOP))
    assert 15 < seconds < 60
    message = "another of the 2 processes does not answer within --distributed_timeout ("
    assert printed.count(f"error: {message}") == 1 and printed.count("error: ") == 1, printed
    assert message in root_cause(printed)


@pytest.mark.slow
def test_a_refusal_of_one_process_is_printed_and_recorded(tiny, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(REFUSED.format(root=str(ROOT)))
    printed, seconds = launch("torchrun", str(script), tiny(tmp_path / "run"), lambda pids: None)
    assert seconds < 60 and printed.count("error: process 1 of 2 on ") == 1 and printed.count("error: ") == 1, printed
    assert "CommandError: train.json: row 3: out of luck" in root_cause(printed)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_ends_all(tiny, one, tmp_path):
    """Under `accelerate launch`; one process then resumes."""
    run = tiny(tmp_path / "run", "--resume")
    printed, _ = launch("accelerate", MAIN, run, lambda pids: os.kill(pids[1], signal.SIGTERM))
    assert printed.count("\nstopped and saved at step") == 1 and "error: " not in printed, printed
    assert "CommandError: stopped and saved at step" in root_cause(printed)
    main(run)
    assert [line["step"] for line in without_times(tmp_path / "run")] == list(range(5, 55, 5))
    lines = zip(history(tmp_path / "run"), history(one()[0]), strict=True)
    assert max(abs(a["train_loss"] - b["train_loss"]) for a, b in lines) < 1e-6


@pytest.mark.slow
def test_accelerate_launch_cpu_is_one_process_on_the_cpu(tiny, tmp_path):
    """More than one needs MPI there: --num_processes alone starts a single one."""
    run = tiny(tmp_path / "run", "--iteration_num", "5")
    start = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", MAIN]
    result = subprocess.run([*start, *run], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert "on cpu (fp32)" in result.stdout and "shared by" not in result.stdout
    assert [line["step"] for line in history(tmp_path / "run")] == [5]


def test_the_slurm_script_is_sound():
    assert subprocess.run(["bash", "-n", str(ROOT / "examples" / "slurm.sh")]).returncode == 0
