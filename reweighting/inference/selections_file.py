"""The file of choices that `best_of_n.py` writes: row by row, continued where it was cut off, never two runs mixed.

    selections = Selections(Path("selections.json"), settings)
    rows = rows[selections.done:]
    selections.append([{"id": 7, "chosen": 2, …}])
    selections.finish()

Beside `selections.json` stand `selections.json.run`, the settings that wrote it and whether it is finished, and
`selections.json.lock`, by which a command that writes keeps others out.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from reweighting.errors import UserError


def sidecar(path: Path, suffix: str) -> Path:
    """The file beside an output: `selections.json` -> `selections.json.run`."""
    return path.with_name(path.name + suffix)


class Selections:
    """A list of rows on disk: a JSON list, a row a line, or JSON lines if the name ends in `.jsonl`.

    settings: what the rows depend on, as JSON has it. done: the rows that are there already. finished: nothing is left
    to do. Raises UserError if the file is not this run's, or cannot be written.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, settings
        self._lines = path.suffix.lower() == ".jsonl"
        self._head, self._end, self._foot = (b"", b"\n", b"") if self._lines else (b"[\n", b",\n", b"\n]\n")
        self.done, self.finished = 0, False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The system drops it when the process ends, however it ends.
            self._lock = FileLock(sidecar(path, ".lock"))
            self._lock.acquire(timeout=0)
            if path.exists():
                self._continue()
            else:
                self._note(False)
                path.write_bytes(self._head)
        except Timeout as error:
            raise UserError(f"--output {path}: another command writes there: wait for it, or name another.") from error
        except OSError as error:
            raise UserError(f"--output {path}: cannot be written: {error.strerror or error}") from error

    def append(self, rows: Sequence[dict]) -> None:
        """Add rows; they are in the file when this returns, whatever happens to the process then."""
        text = b"".join(json.dumps(row, allow_nan=False).encode() + self._end for row in rows)
        try:
            with open(self.path, "ab") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"--output {self.path}: cannot be written: {error.strerror or error}") from error
        self.done += len(rows)

    def finish(self) -> None:
        """Close the list and note that it is whole. At least one row."""
        if not self._lines:
            with open(self.path, "r+b") as file:
                file.seek(-len(self._end), os.SEEK_END)
                file.write(self._foot)
        self._note(True)
        self.finished = True

    def _note(self, finished: bool) -> None:
        target, aside = sidecar(self.path, ".run"), sidecar(self.path, ".run.new")
        aside.write_text(json.dumps({"finished": finished, **self.settings}, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, target)

    def _continue(self) -> None:
        """Find out how far an earlier run came, and drop a last row that was cut off."""
        remedy = "Name another --output, or move that file away."
        try:
            note = json.loads(sidecar(self.path, ".run").read_text(encoding="utf-8"))
            self.finished = note.pop("finished")
        except (OSError, ValueError, KeyError, AttributeError):
            raise UserError(f"--output {self.path}: is there, but not known to be a run's. {remedy}") from None
        for name, value in self.settings.items():
            if note.get(name) != value:
                raise UserError(f"--output {self.path}: written by another run, whose {name} was another. {remedy}")
        if self.finished:
            return
        with open(self.path, "r+b") as file:
            head = file.read(len(self._head))
            if not self._head.startswith(head):
                raise UserError(f"--output {self.path}: is there, but does not begin as a list of choices. {remedy}")
            whole = len(head)
            for line in file:
                if not line.endswith(self._end) or not _is_json(line.removesuffix(self._end)):
                    break
                whole, self.done = whole + len(line), self.done + 1
            file.truncate(whole)
            file.seek(0)
            file.write(self._head)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
