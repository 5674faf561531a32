"""Signals that ask a run to end: it finishes its step, saves, and exits with 128 + the signal's number."""

import signal
import sys
from contextlib import suppress
from types import FrameType


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
ASKING = ("SIGTERM", "SIGINT", "SIGUSR1")  # the last is what schedulers send before they take a machine away


class Stopped(Exception):
    """A run ended because a signal asked for it, with everything saved. signum: its number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class StopSignals:
    """While this context is open, the first signal is only noted in `received`; a second SIGINT stops at once.

    received: the signal's number, None as long as there was none.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for name in ASKING:
            if hasattr(signal, name):  # Windows has no SIGUSR1
                number = getattr(signal, name)
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
