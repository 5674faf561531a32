"""The file of choices that `best_of_n.py` writes: row by row, resumed where it was cut off, never two runs mixed.

    selections = Selections(Path("selections.json"), settings)
    selections.keep(8)                                       # of those that are there already
    selections.append([{"id": 7, "chosen": 2, …}])
    selections.finish()

Beside `selections.json` are `selections.json.run`, the settings that wrote it and whether it is finished, and
`selections.json.lock`, by which a command that writes keeps others out.
"""

import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from reweighting.errors import UserError
from reweighting.files import atomic_write_text

REMEDY = "Name another --output, or move that file away."


def sidecar(path: Path, suffix: str) -> Path:
    """Return the file beside an output: `selections.json` -> `selections.json.run`."""
    return path.with_name(path.name + suffix)


class Selections:
    """A list of rows on disk: a JSON list, a row a line, or JSON lines if the name ends in `.jsonl`.

    Attributes:
        done: the rows that are in the file.
        finished: whether nothing is left to do.
    """

    def __init__(self, path: Path, settings: dict):
        """Open the file, or make it.

        Args:
            path: the file; its folder is made.
            settings: whatever the rows depend on, {name: value of JSON}.

        Raises:
            UserError: if the file is not one of these settings, if another command writes there, or if it cannot be
                written.
        """
        self.path, self.settings = path, settings
        self._lines = path.suffix.lower() == ".jsonl"
        self._head, self._end, self._foot = (b"", b"\n", b"") if self._lines else (b"[\n", b",\n", b"\n]\n")
        self._ends = array("Q")  # where each row ends, in bytes
        self.finished = False
        try:
            self._check_own()  # before the lock, which would be left beside a file that is not ours
            path.parent.mkdir(parents=True, exist_ok=True)
            # The system drops it when the process ends, however it ends.
            self._lock = FileLock(sidecar(path, ".lock"))
            self._lock.acquire(timeout=0)
            if path.exists():
                self._resume()
            else:
                self._note(False)
                path.write_bytes(self._head)
        except Timeout as error:
            raise UserError(f"--output {path}: another command writes there: wait for it, or name another.") from error
        except OSError as error:
            raise UserError(f"--output {path}: cannot be written: {error.strerror or error}") from error

    @property
    def done(self) -> int:
        """How many rows are in the file."""
        return len(self._ends)

    def keep(self, count: int) -> None:
        """Drop the rows behind the first `count`.

        Raises:
            UserError: if the file cannot be written.
        """
        if count < self.done:
            del self._ends[count:]
            try:
                os.truncate(self.path, self._ends[-1] if count else len(self._head))
            except OSError as error:
                raise UserError(f"--output {self.path}: cannot be written: {error.strerror or error}") from error

    def append(self, rows: Sequence[dict]) -> None:
        """Add rows; they are in the file when this returns, whatever happens to the process then.

        Raises:
            UserError: if the file cannot be written.
        """
        texts = [json.dumps(row, allow_nan=False).encode() + self._end for row in rows]
        try:
            with open(self.path, "ab") as file:
                file.write(b"".join(texts))
        except OSError as error:
            raise UserError(f"--output {self.path}: cannot be written: {error.strerror or error}") from error
        for text in texts:
            self._ends.append((self._ends[-1] if self._ends else len(self._head)) + len(text))

    def finish(self) -> None:
        """Close the list, which has a row, and note that it is whole."""
        if not self._lines:
            with open(self.path, "r+b") as file:
                file.seek(-len(self._end), os.SEEK_END)
                file.write(self._foot)
        self._note(True)
        self.finished = True

    def _note(self, finished: bool) -> None:
        """Write the settings beside the file."""
        text = json.dumps({"finished": finished, **self.settings}, indent=1) + "\n"
        atomic_write_text(sidecar(self.path, ".run"), text)

    def _check_own(self) -> None:
        """Raise UserError for a file that no run wrote."""
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"--output {self.path}: is no regular file. Name a file.")
        if self.path.exists() and not sidecar(self.path, ".run").is_file():
            raise UserError(f"--output {self.path}: is there, but not known to be a run's. {REMEDY}")

    def _resume(self) -> None:
        """Find out how far an earlier run came, and drop a last row that was cut off."""
        try:
            note = json.loads(sidecar(self.path, ".run").read_text(encoding="utf-8"))
            self.finished = bool(note.pop("finished"))
        except (OSError, ValueError, KeyError, AttributeError):
            raise UserError(f"--output {self.path}: is there, but not known to be a run's. {REMEDY}") from None
        for name, value in self.settings.items():
            if note.get(name) != value:
                raise UserError(f"--output {self.path}: holds choices of another run: its {name} differs. {REMEDY}")
        if self.finished:
            return
        with open(self.path, "r+b") as file:
            head = file.read(len(self._head))
            if not self._head.startswith(head):
                raise UserError(f"--output {self.path}: is there, but does not begin as a list of choices. {REMEDY}")
            end = len(self._head)
            for line in file:
                if not line.endswith(self._end) or not _is_json(line.removesuffix(self._end)):
                    break
                end += len(line)
                self._ends.append(end)
            file.truncate(end)
            file.seek(0)
            file.write(self._head)


def _is_json(text: bytes) -> bool:
    """Whether a line is one whole value."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
