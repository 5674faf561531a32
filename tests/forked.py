"""Commands in a process of their own, without the ten seconds that their imports take: the process is a fork of this
one, which has imported them.

    done = run("main.py", *flags)                      # as subprocess.run: .returncode, .stdout, .stderr
    process = Command("main.py", *flags, stderr=PIPE)  # as subprocess.Popen

The script itself runs, as `__main__`, with the streams, signals and working folder of a new process. What importing
does, and what Python's own options change, needs a real start: `test_entrypoint.py`, `test_packaging.py`.
"""

import gc
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from subprocess import PIPE

from tests.runs import ROOT


class Command(subprocess.Popen):
    """A script of `reweighting/` with its arguments; the options are Popen's: the streams, `cwd`, `env`, `preexec_fn`.

    Its output is text unless `text=False`.
    """

    def __init__(self, script: str, *arguments: str, text: bool = True, **options):
        super().__init__([str(ROOT / "reweighting" / script), *arguments], text=text, **options)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_):  # fmt: skip
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()  # what a child collects as garbage may wait for a thread, which a fork does not take along
        gc.freeze()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                streams = [p2cread, c2pwrite, errwrite]
                code = _in_child(list(map(str, args)), preexec_fn, cwd, env, streams)
            finally:
                os._exit(code)
        gc.unfreeze()
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def _in_child(args: list[str], preexec_fn, cwd, env: dict | None, streams: list[int]) -> int:
    """Become the script, and return its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
    kept = [os.dup(stream) if stream != -1 else number for number, stream in enumerate(streams)]
    for number, stream in enumerate(kept):
        os.dup2(stream, number)
    if cwd is not None:
        os.chdir(cwd)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    if preexec_fn is not None:
        preexec_fn()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as Python does when it starts
            signal.signal(signal.SIGINT, signal.default_int_handler)
    os.closerange(3, 1024)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False, encoding="utf-8")
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False, encoding="utf-8")
    sys.argv = args
    code = 0
    try:
        runpy.run_path(args[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for the script's own threads
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120  # as Python ends
    return code


def heed_interrupts() -> None:
    """End at SIGINT, as from a terminal, also where whoever runs the tests ignores it: a `preexec_fn`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(number: int, reached: Callable[[], bool], script: str, *arguments: str) -> tuple[int, str]:
    """Start a script and send it a signal once `reached` says so; its exit code, and what it printed as errors."""
    process = Command(script, *arguments, stderr=PIPE, preexec_fn=heed_interrupts)
    deadline = time.monotonic() + 120
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None
    process.send_signal(number)
    errors = process.communicate()[1]
    return process.returncode, errors


def run(script: str, *arguments: str, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    """Run a script to its end and take what it prints."""
    with Command(script, *arguments, stdout=PIPE, stderr=PIPE, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
