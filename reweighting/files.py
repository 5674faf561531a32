"""Files that are complete or absent, digests of their contents, and what may be read as a file."""

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from reweighting.errors import UserError


def digest(*files: Path) -> str:
    """A digest of the files' bytes, in this order."""
    together = hashlib.sha256()
    for path in files:
        with open(regular_file(path), "rb") as file:
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


PIPES = ("/dev/fd/", "/dev/stdin", "/proc/")  # where the shell's pipes have their names
KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_copies: dict[tuple[int, int], IO[bytes]] = {}  # of pipes, by device and inode; they are removed when the process ends


def regular_file(path: Path) -> Path:
    """Return the file that the content of `path` can be read from, any number of times.

    That is `path` itself, or for a pipe of the shell, such as `<(zcat rows.json.gz)`, a temporary copy of what came
    through it: a pipe can be read only once, and the run reads its rows, their digest and its settings.

    Raises:
        UserError: it is a device, a socket or a FIFO in a folder, which may never end.
        OSError: there is no such file, or it is a folder.
    """
    status = os.stat(path)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        return path
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFIFO or not os.path.abspath(path).startswith(PIPES):
        raise UserError(f"{path}: this is {KINDS.get(kind, 'something else')}, not a regular file. Name a file, or a "
                        "pipe of the shell such as <(zcat rows.json.gz).")  # fmt: skip
    place = status.st_dev, status.st_ino
    if place not in _copies:
        copy = _copies[place] = tempfile.NamedTemporaryFile(prefix="pipe_")
        with open(path, "rb") as pipe:
            shutil.copyfileobj(pipe, copy)
        copy.flush()
    return Path(_copies[place].name)
