"""Several processes speak with one voice and end together; light enough to load before anything else.

`torchrun` and `accelerate launch` start the command several times and number the processes. Number 0, the main one,
prints. The others are silent: what they would say of an error is handed to the main one, which says it and ends the
run; where that one has ended, another says it. Each process also tells twice a second that it is there: one that is not
heard of ends the run too, whatever the others are waiting for.
"""

import io
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TICK = 0.5  # seconds between two signs of life
SILENCE = 20.0  # seconds without one, after which a process counts as dead: torchrun kills the others 30 s after it
GRACE = 2.0  # seconds that the main process has to end by itself, where all have found the same
HEARING = 10.0  # seconds that the main process has to say what another one found
GO_ON = "--resume goes on from the last checkpoint"
KEPT = 20_000  # characters that a silent process remembers of what it would have printed

_watch: "Watch | None" = None  # of this process, once it has joined the others


def dist_env() -> tuple[int, int, int]:
    """This process's number, how many there are, and its number on this machine: torchrun's environment."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, 0
    return int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", 0))


class Watch(threading.Thread):
    """Ends this process when another one has failed, or is not heard of.

    store: a connection of its own to a store of keys (torch's TCPStore): `add`, `set`, `get`, `check`, `compare_set`.
    """

    def __init__(self, store, rank: int, world: int):
        super().__init__(daemon=True)
        self.store, self.rank, self.world = store, rank, world
        self.code = 2  # that this process ends with, unless it is about to end by itself with another
        self._over, self._speaking = threading.Event(), threading.Lock()

    def run(self) -> None:
        """Until `stop`: give signs of life, and look for those of others."""
        others = range(1, self.world) if self.rank == 0 else (0,)  # the main process tells all what it finds
        heard = {other: (-1, 0) for other in others}  # signs of life, and looks without a new one
        try:
            while not self._over.wait(TICK):
                self.store.add(f"alive/{self.rank}", 1)
                if self.store.check(["trouble"]):
                    self._leave(self._to_say(self.store.get("trouble").decode()))
                if self.store.check(["told"]):
                    self._leave(None)
                for other, (count, looks) in heard.items():
                    now = self.store.add(f"alive/{other}", 0)
                    heard[other] = now, looks + 1 if now == count else 0
                    # By looks, not by the clock: a run may be stopped as a whole, and continued.
                    if looks * TICK > SILENCE:
                        self.tell(f"process {other} of {self.world} has not been heard of for {SILENCE:.0f} s; {GO_ON}")
        except Exception:  # the store is gone, and with it the process that kept it
            self._leave(f"what kept the processes together, the main process or the machine of it, has ended; {GO_ON}")

    def _to_say(self, trouble: str) -> str | None:
        """The trouble, where it is this process that says it: the main one, or another if that has ended; else None."""
        for _ in range(int(GRACE / TICK) if self.rank else 0):
            if self.store.check(["told"]) or self._over.wait(TICK):
                return None
        return trouble if self.store.compare_set("speaker", "", str(self.rank)).decode() == str(self.rank) else None

    def tell(self, trouble: str) -> None:
        """Let the main process know of a trouble, for it to say; the first one counts."""
        self.store.compare_set("trouble", "", trouble)

    def stop(self) -> None:
        """Watch no more; where a trouble is just being said, the process ends in here."""
        self._over.set()
        with self._speaking:
            pass

    def _leave(self, trouble: str | None) -> None:
        """End this process, unless it ends by itself meanwhile. trouble: what to say, None if another says it."""
        if self._over.wait(0 if self.rank == 0 else GRACE):
            return
        with self._speaking:
            if self._over.is_set():
                return
            if trouble is not None:
                print(f"\nerror: {trouble}", file=sys.__stderr__, flush=True)
                _note(trouble)
                self.say_told()
            os._exit(self.code)

    def say_told(self) -> None:
        """What there is to say is said: the others may end."""
        try:
            self.store.set("told", "")
            time.sleep(2 * TICK)  # the store may end with this process
        except Exception:  # it is gone already
            return


def watch(store, rank: int, world: int) -> Watch:
    """Begin to watch the other processes."""
    global _watch
    _watch = Watch(store, rank, world)
    _watch.start()
    return _watch


@contextmanager
def rank0_output() -> Iterator[None]:
    """The whole of a command: only the main process prints, and whichever fails, all end. Nothing where there is one
    process only."""
    rank, world, _ = dist_env()
    if world == 1:
        yield
        return
    said = _Held()
    if rank:
        sys.stdout, sys.stderr = open(os.devnull, "w"), said
    try:
        yield
    except BaseException as error:  # the process ends here, whatever it is
        if isinstance(error, SystemExit):
            code, words = error.code, str(error.__context__ or error)  # `run_command` has made it of what says more
        else:
            code, words = 1, repr(error)
            traceback.print_exc()
        if code:
            _note(words)
            if _watch is not None:
                _watch.code = code
        if code and rank:
            _hand_over(said.getvalue().strip(), rank, world)
        elif code and _watch is not None:
            _watch.stop()
            _watch.say_told()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code or 0)  # not by way of the process group's end, which waits for the others


def _note(words: str) -> None:
    """Leave the error where torchrun looks for it, which then repeats it at the end of all that it prints."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        about = {"message": words, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):  # torchrun has ended and taken it along
            Path(file).write_text(json.dumps({"message": about}), encoding="utf-8")


def _hand_over(words: str, rank: int, world: int) -> None:
    """Have the main process say what this one ends with; if it does not, say it here. Whoever started the processes
    ends the main one when another leaves before it."""
    time.sleep(GRACE)
    words = re.split("^error: ", words, maxsplit=1, flags=re.M)[-1]  # what was said before is of no use to anyone now
    words = f"process {rank} of {world} on {socket.gethostname()}: {words}"
    try:
        if _watch is not None:
            _watch.tell(words)
    except Exception:  # the store has ended, and so has the main process
        return
    time.sleep(HEARING)  # most often ended meanwhile
    print(words, file=sys.__stderr__, flush=True)


class _Held(io.StringIO):
    """The last of what is printed, kept in memory."""

    def write(self, text: str) -> int:
        if self.tell() > KEPT:
            last = self.getvalue()[-KEPT // 2 :]
            self.seek(0)
            self.truncate()
            super().write(last)
        return super().write(text)
