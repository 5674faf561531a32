"""How a command starts and ends: exit codes, one line for an error, output without a reader, Python's own options."""

import errno
import os
import subprocess
import sys
import time
import types

import pytest
import torch

from reweighting import entrypoint
from reweighting.config.commands import CONFIGS
from reweighting.config.parsing import CommandConfig
from reweighting.entrypoint import run_command
from reweighting.errors import UserError
from reweighting.training.signals import Stopped
from tests.forked import Command
from tests.runs import ROOT, flags, history


class NoFlags(CommandConfig):
    """A command that takes whatever it is given."""

    @classmethod
    def parse(cls, argv):
        return cls()


@pytest.fixture
def ending(monkeypatch, capsys):
    """ending(work): the exit code and the error line of a command that does `work`."""

    def end(work) -> tuple[int, str]:
        command = types.ModuleType("reweighting.made_up")
        command.main, command.AFTER_INTERRUPT, command.LESS_MEMORY = work, "then resume", "Lower --batch_size"
        monkeypatch.setitem(sys.modules, command.__name__, command)
        monkeypatch.setitem(CONFIGS, command.__name__, NoFlags)
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, getattr(sys, stream))  # which the command replaces
        with pytest.raises(SystemExit) as ended:
            run_command(command.__name__)
        return ended.value.code, capsys.readouterr().err

    return end


def raising(error: BaseException):
    def work(*_) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("train.json: row 3: found 9"), 2, "error: train.json: row 3: found 9"),
        (UserError("a\x1b[31m\u202edomain\0"), 2, r"error: a\x1b[31m\u202edomain\x00"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a\x07b.json"), 2, r"error: a\x07b.json: No such file"),
        (OSError(errno.ENOSPC, "No space left", "w"), 2, "error: w: cannot be written: No space left; then resume"),
        (Stopped(15, "stopped and saved at step 3"), 143, "stopped and saved at step 3; then resume"),
        (KeyboardInterrupt(), 130, "interrupted; then resume"),
        (
            ModuleNotFoundError("No module named 'betty'", name="betty.problems"),
            2,
            "error: training needs Betty, which",
        ),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(ending, error, code, line):
    ended, printed = ending(raising(error))
    assert ended == code and printed.startswith(line) and printed.count("\n") == 1, printed


def test_out_of_memory_is_one_line_with_the_remedy(ending):
    place = "error: out of memory: 1 EiB for entrypoint._run did not fit into main memory"
    remedy = "Lower --batch_size. then resume"
    assert ending(lambda argv: torch.empty(2**60, dtype=torch.uint8)) == (2, f"{place}. {remedy}\n")


def test_what_is_a_fault_of_the_program_keeps_its_traceback(ending):
    with pytest.raises(ZeroDivisionError):
        ending(lambda argv: 1 // 0)


@pytest.mark.parametrize(
    ("busy", "given", "threads", "policy"),
    [(0, None, "2", None), (60, None, "2", "PASSIVE"), (60, "ACTIVE", "2", "ACTIVE"), (60, None, "1", None)],
)
def test_threads_wait_passively_where_cores_are_busy_unless_the_user_says_otherwise(
    ending, monkeypatch, busy, given, threads, policy
):
    monkeypatch.setattr(entrypoint.psutil, "cpu_percent", lambda **_: [busy] * 256)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        del os.environ["OMP_WAIT_POLICY"]
    seen = []
    ending(lambda argv: seen.append(os.environ.get("OMP_WAIT_POLICY")) or sys.exit(0))
    assert seen == [policy]


def test_a_busy_core_is_noticed():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(0.2)
        found = entrypoint.machine_is_busy()
        busy.kill()
    assert found


def test_torch_is_loaded_after_the_policy_is_set():
    """libgomp reads the environment when it is loaded."""
    script = "import sys, reweighting.entrypoint as e; e.prepare_process(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_flags_and_missing_files_do_not_wait_for_torch():
    """Each command's `--help`, a wrong flag and a file that is not there end before its own imports."""
    script = """
import sys
from reweighting.config.commands import CONFIGS
from reweighting.entrypoint import run_command
needed = {"evaluate": ["--eval_json_file"], "show": ["--id", "0", "--candidates_json_file"],
          "best_of_n": ["--candidates_json_file"], "main": ["--baseline", "--train_json_file"]}
ends = []
for module in CONFIGS:
    name = module.removeprefix("reweighting.")
    for given in (["--help"], ["--no_such_flag"], [*needed[name], "nowhere.json"] if name in needed else ["--help"]):
        sys.argv = [name, *given]
        try:
            run_command(module)
        except SystemExit as end:
            ends.append(end.code)
assert ends == [0, 2, 2] * 3 + [0, 2, 0] * 2 + [0, 2, 2], ends
assert "torch" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("error: nowhere.json: no such file. Check the path.") == 4


def test_ctrl_c_before_the_command_is_one_line(ending, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(entrypoint, "machine_is_busy", raising(KeyboardInterrupt()))
    assert ending(raising(AssertionError())) == (130, "interrupted\n")


@pytest.mark.slow
def test_a_reader_that_goes_away_and_pythons_options(demo, tmp_path):
    """`python -O -W error … | head -1`: the command goes on to its end and writes its files."""
    run = flags(demo, tmp_path / "run", "--iteration_num", "5")
    start = [sys.executable, "-O", "-W", "error", str(ROOT / "reweighting" / "main.py"), *run]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    process.stdout.close()
    printed = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and first and "Traceback" not in printed and "Broken" not in printed, printed
    assert len(history(tmp_path / "run")) == 1 and (tmp_path / "run" / "prm").is_dir()


def test_both_streams_without_a_reader(demo, tmp_path):
    """`… 2>&1 | head -1`."""
    run = flags(demo, tmp_path / "run", "--iteration_num", "5")
    process = Command("main.py", *run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait(300) == 0 and (tmp_path / "run" / "prm").is_dir()
