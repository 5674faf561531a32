"""The output folder: held by one run at a time, what an earlier run left set aside, files whole or absent."""

import itertools
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from reweighting.errors import UserError
from reweighting.one_voice import place

OUTPUTS = ("checkpoints", "history.jsonl", "domain_weights.json", "prm", "figures", "diagnostics")
HOLDER_FILE = "run.json"  # who writes into the folder, or did last


@contextmanager
def hold_folder(path: str) -> Iterator[Path]:
    """The output folder, made if it is missing, held by this process as long as the context is open; of several
    processes, by the main one.

    The system drops the lock when a process ends, however it ends. Raises UserError if nothing can be written, or if
    another run holds the folder, and says which.
    """
    folder = Path(path)
    if place()[0]:
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_text("")
        probe.unlink()
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"--weights_path {folder}: another run writes there ({_holder(folder)}): wait for it, end it, "
                        "or name another folder") from error  # fmt: skip
    except OSError as error:
        raise UserError(f"--weights_path {folder}: cannot be written: {error.strerror or error}") from error
    try:
        clean_up(folder)
        holder = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.now().isoformat(timespec="seconds"),
            "command": sys.argv,
        }
        write_whole(folder / HOLDER_FILE, json.dumps(holder, indent=1) + "\n")
        yield folder
    finally:
        lock.release()


def clean_up(folder: Path) -> None:
    """Put in order what a run that was killed has left in its folder."""
    for old in (*folder.glob("checkpoints/.step-*.old"), *folder.glob(".prm.old")):
        place = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not place.exists():  # killed just before the new one got its name: the old one is whole
            old.rename(place)
    for pattern in (".dry-run-*", "checkpoints/.step-*", ".taken-over", ".prm.*"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def _holder(folder: Path) -> str:
    """Who holds the folder, in words."""
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['host']}, since {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said who it is"


def set_aside(folder: Path) -> None:
    """Move what an earlier run left into `earlier-1`, `earlier-2`, …: nothing is lost, nothing of two runs is mixed."""
    left = [folder / name for name in OUTPUTS if (folder / name).exists()]
    if left:
        place = next(p for n in itertools.count(1) if not (p := folder / f"earlier-{n}").exists())
        place.mkdir()
        for item in left:
            item.rename(place / item.name)
        print(f"what an earlier run left in {folder} is now in {place}")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that at any moment either all of the new text is there or the old file still is."""
    aside = path.with_name(f".{path.name}.writing")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_folder_whole(place: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `place`, or make it anew, from what `fill` writes into the folder that it is given.

    Everything is on disk before the folder gets its name, so that it is complete or absent. What cannot be finished is
    removed again. Raises UserError if the disk takes no more.
    """
    aside, old = (place.with_name(f".{place.name}.{word}") for word in ("writing", "old"))
    for left in (aside, old):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        fill(aside)
        for path in aside.rglob("*"):
            _sync(path)
        _sync(aside)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        # torch and safetensors report a full disk as errors of their own kinds
        if isinstance(error, OSError | RuntimeError | ValueError | SafetensorError):
            raise UserError(f"{place} cannot be written: {error}; make room, then go on with --resume") from error
        raise
    if place.exists():
        place.rename(old)
    aside.rename(place)
    _sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk (folders: where the system can)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
