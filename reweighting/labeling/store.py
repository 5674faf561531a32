"""What the policy has answered, on disk as it comes: an interrupted run asks for nothing twice.

    with Store(Path("labels.sqlite"), settings) as store:
        store.put(question.key, 2, WHOLE, {"text": "Step 1: ..."})  # the third answer
        store.put(question.key, 2, 0, [3, 16])  # its first step: 3 of 16 continuations are correct
        store.get(question.key, 2, 0)
    store.put_verdict(question.key, "a dozen", True)  # the judge: it means the same as the correct answer

An SQLite file: each entry is written whole or not at all, whatever ends the process.
"""

import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from reweighting.errors import UserError
from reweighting.files import cannot_write

WHOLE = -1  # in the place of a step's number: the answer itself, as {"text": ...}, null if the server withholds it
VERSION = 2  # of these entries
VERDICTS = {True: "correct", False: "incorrect", None: "unknown"}
TABLES = {"settings", "entries", "verdicts"}
# SQLite's codes of a file that can be read and is no store; all others are the disk's or the system's.
FOREIGN = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT)


class Store:
    """Answers and counts by question, answer and step.

    Args:
        path: the file; made if it is missing.
        settings: what the content depends on.

    Raises:
        UserError: the file was made with other settings, is in use, or is no such file.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self._lock = FileLock(f"{path}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{path}: another process writes it. Wait for it, or name another --store.") from None
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            self._file = sqlite3.connect(path, isolation_level=None)
            self._refuse_others()
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT)")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS entries (question TEXT, answer INTEGER, step INTEGER, value TEXT, "
                "PRIMARY KEY (question, answer, step)) WITHOUT ROWID"
            )
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (question TEXT, given TEXT, verdict TEXT, "
                "PRIMARY KEY (question, given)) WITHOUT ROWID"
            )
            self._check(settings)
        except sqlite3.Error as error:
            self._lock.release()
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in FOREIGN:  # the primary code
                raise UserError(f"{path}: is no store of answers ({error}). Move it away.") from error
            raise cannot_write(path, error) from error
        except UserError:
            self._lock.release()
            raise

    def _refuse_others(self) -> None:
        """Raise UserError, before anything is written, if the file is another program's database."""
        tables = {name for (name,) in self._file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        tables = {name for name in tables if not name.startswith("sqlite_")}  # SQLite's own
        if others := sorted(tables - TABLES):
            raise UserError(f"{self.path}: is no store of answers (it has the table {others[0]!r:.40}). Name another "
                            "--store.")  # fmt: skip

    def _check(self, settings: dict[str, Any]) -> None:
        """Raise UserError if the file was made with other settings."""
        made_with = dict(self._file.execute("SELECT name, value FROM settings"))
        made_with.pop("answers", None)  # written until further answers could join
        texts = {name: json.dumps(value) for name, value in (settings | {"version": VERSION}).items()}
        if not made_with or self._file.execute("SELECT 1 FROM entries LIMIT 1").fetchone() is None:
            self._file.execute("DELETE FROM settings")
            self._file.executemany("INSERT INTO settings VALUES (?, ?)", texts.items())
        elif made_with != texts:
            changed = sorted(name for name in {*made_with, *texts} if made_with.get(name) != texts.get(name))
            found = "; ".join(f"{name}: {made_with.get(name)}, now {texts.get(name)}" for name in changed)
            raise UserError(f"{self.path}: was made with other settings ({found:.300}). Name another --store, or use "
                            "the same settings.")  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._lock.release()

    def get(self, question: str, answer: int, step: int) -> Any:
        """Return an entry, None if it is not there.

        Raises:
            UserError: the file is damaged.
        """
        row = self._run("SELECT value FROM entries WHERE question = ? AND answer = ? AND step = ?",
                        (question, answer, step))  # fmt: skip
        if row is None:
            return None
        try:
            value = json.loads(row[0])
            if not _is_entry(value, step):
                raise ValueError(f"unexpected {row[0]:.40}")
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.path}: is damaged ({error!s:.100}). Move it away, or name another --store."
            ) from error
        return value

    def put(self, question: str, answer: int, step: int, value: Any) -> None:
        """Write an entry.

        Raises:
            UserError: it cannot be written.
        """
        self._run("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", (question, answer, step, json.dumps(value)))

    def verdict(self, question: str, given: str) -> tuple[bool | None, bool]:
        """Return the judge's verdict about an answer, and whether there is one: it may be None, for unknown.

        Raises:
            UserError: the file is damaged.
        """
        row = self._run("SELECT verdict FROM verdicts WHERE question = ? AND given = ?", (question, given))
        if row is None:
            return None, False
        if row[0] not in VERDICTS.values():
            raise UserError(
                f"{self.path}: is damaged (unexpected {row[0]!r:.40}). Move it away, or name another --store."
            )
        return next(verdict for verdict, name in VERDICTS.items() if name == row[0]), True

    def put_verdict(self, question: str, given: str, verdict: bool | None) -> None:
        """Write the judge's verdict about an answer.

        Raises:
            UserError: it cannot be written.
        """
        self._run("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", (question, given, VERDICTS[verdict]))

    def _run(self, command: str, values: tuple[Any, ...]) -> Any:
        """The first row that a command gives."""
        try:
            return self._file.execute(command, values).fetchone()
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: cannot be read or written ({error}). Look at the disk; if the file is "
                            "damaged, move it away.") from error  # fmt: skip


def _is_entry(value: Any, step: int) -> bool:
    """Whether an entry has the form that its place asks for."""
    if step == WHOLE:
        return isinstance(value, dict) and isinstance(value.get("text", 0), str | None)
    return isinstance(value, list) and len(value) == 2 and all(type(count) is int for count in value)
