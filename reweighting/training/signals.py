"""Signals that ask a run to end: it finishes its step, saves, and exits with 128 + the signal's number."""

import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any


class _Stderr:
    """stderr that nobody may be reading any more: Ctrl-C ends the `tee` behind a pipe too."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str):
        return getattr(sys.stderr, name)


STDERR = _Stderr()
# SIGUSR1 is what schedulers send before they take a machine away, SIGHUP what comes when a terminal or an SSH
# connection closes.
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


class Stopped(Exception):
    """A run ended because a signal asked for it, with everything saved. signum: the signal's number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class StopSignals:
    """While this context is open, the first signal is only noted; a second Ctrl-C interrupts the step.

    Attributes:
        received: the first signal's number, None as long as there was none.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)  # Windows has not all of them
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                continue  # ignored: `nohup` wants the run to outlive the terminal
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving", file=STDERR)
