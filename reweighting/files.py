"""Files that are complete or absent, and digests of their contents."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from reweighting.errors import UserError


def digest(*files: Path) -> str:
    """A digest of the files' bytes, in this order."""
    together = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            together.update(hashlib.file_digest(file, "sha256").digest())
    return together.hexdigest()


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file so that at any moment either all of the new text is there or the old file still is."""
    aside = path.with_name(f".{path.name}.writing")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def atomic_write_dir(place: Path, fill: Callable[[Path], None]) -> None:
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
