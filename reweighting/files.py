"""Whole files and folders, complete under their name or not there at all; digests, and what may be read as a file.

    atomic_write_text(path, text)
    with atomic_file(path) as file:             # bytes of any kind: a figure, a page, an archive
        figure.savefig(file)
    atomic_write_dir(folder, fill)
    with temporary_dir(parent, "trial") as trial: ...

What has not its name lies beside it as `.tmp-<8 hex digits>-<age>-<name>`: `new` is unfinished, `whole` waits for the
name, `old` had it. A killed process leaves it there; `remove_temporaries` clears it away at the next start, and
`atomic_file` does when the same file is written again.
"""

import atexit
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, TextIO

from safetensors import SafetensorError

from reweighting.errors import UserError

AGES = ("whole", "old", "new")  # in this order they get a name that nothing else has; `new` never does
TEMPORARY = re.compile(rf"\.tmp-[0-9a-f]{{8}}-(?P<age>{'|'.join(AGES)})-(?P<name>.+)", re.DOTALL)
PIPES = ("/dev/fd/", "/dev/stdin", "/proc/")  # where the shell's pipes have their names
KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_copies: dict[tuple[int, int], IO[bytes]] = {}  # of pipes, by device and inode; they are removed when the process ends
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: if it cannot be opened, or is a folder, a pipe, a socket or a device, which might never end.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb")


def open_append(path: Path) -> TextIO:
    """Open a text file to append whole lines to; made if it is missing, never reached through a symbolic link."""
    no_follow = getattr(os, "O_NOFOLLOW", 0)
    return open(path, "a", buffering=1, encoding="utf-8", opener=lambda p, flags: os.open(p, flags | no_follow, 0o666))


def digest(*files: Path) -> str:
    """Compute one SHA-256 digest of the files' contents, in the order given.

    Raises:
        OSError: if one cannot be read.
        UserError: if one is a device or the like, which might never end.
    """
    combined = hashlib.sha256()
    for path in files:
        with open(regular_file(path), "rb") as file:
            combined.update(hashlib.file_digest(file, "sha256").digest())
    return combined.hexdigest()


@contextmanager
def atomic_file(path: Path, sync: bool = True) -> Generator[BinaryIO]:
    """Write a binary file that takes its name only when all of it is on disk; until then the old one stays.

    The file gets the permissions of the user's umask. A symbolic link at `path` is replaced, not followed.

    Args:
        path: the file.
        sync: False: only when all of it is written; a power cut may damage it. For many files that can be made again.

    Yields:
        The file to write into. If the block raises, nothing is left of it.

    Raises:
        OSError: if the disk refuses.
    """
    if sync:
        _remove_abandoned(path)
    unfinished, file = _open_new(path)
    try:
        with file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file of these bytes; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file of this text; see `atomic_file`."""
    atomic_write_bytes(path, text.encode())


def atomic_write_dir(
    folder: Path, fill: Callable[[Path], object], set_aside: Callable[[], object] | None = None
) -> None:
    """Create or replace a folder, which takes its name only when everything in it is on disk.

    Args:
        folder: the folder; one that is there is replaced as a whole.
        fill: writes the content into the folder that it is given. All of it then gets the permissions of the user's
            umask.
        set_aside: moves the folder that is there elsewhere; by default it is removed.

    Raises:
        UserError: if the disk refuses. What was there before is still there.
    """
    unfinished, whole, old = (_temporary(folder, age) for age in ("new", "whole", "old"))
    try:
        unfinished.mkdir(parents=True)
        fill(unfinished)
        _apply_umask(unfinished)
        for path in unfinished.rglob("*"):
            _sync(path)
        _sync(unfinished)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        # torch and safetensors report a full disk as errors of their own kinds
        if isinstance(error, OSError | RuntimeError | ValueError | SafetensorError):
            raise cannot_write(folder, error) from error
        raise
    unfinished.rename(whole)
    if set_aside is not None:
        set_aside()
    elif folder.exists():
        folder.rename(old)
    whole.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_dir(folder: Path) -> None:
    """Remove a folder, under a temporary name, so that half of it is never taken for the whole."""
    doomed = _temporary(folder, "new")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def temporary_dir(parent: Path, name: str) -> Generator[Path]:
    """Make a folder in `parent` that is removed at the end of the block; `name` tells what it is for.

    Raises:
        OSError: if it cannot be made.
    """
    folder = _temporary(parent / name, "new")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes have left in a folder; what is whole gets its name if nothing else has it.

    Only whoever has locked the folder may call this.
    """
    left = [(path, match) for path in folder.glob(".tmp-*") if (match := TEMPORARY.fullmatch(path.name))]
    for path, match in sorted(left, key=lambda item: AGES.index(item[1]["age"])):
        target = path.with_name(match["name"])
        if match["age"] != "new" and not os.path.lexists(target):
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def check_not_inputs(outputs: Iterable[Path], inputs: Iterable[str | None]) -> None:
    """Check that no file to write is one that is read, whatever it is called there.

    Args:
        outputs: the files to write; they need not exist.
        inputs: what is read: files, folders or names of data sets; None is left out.

    Raises:
        UserError: naming the two.
    """
    read = [name for name in inputs if name is not None]
    for path in outputs:
        for name in read:
            linked = path.exists() and os.path.exists(name) and path.samefile(name)  # a hard link has another path
            if linked or os.path.realpath(path) == os.path.realpath(name):
                raise UserError(f"{path}: would overwrite the input {name}. Name another output.")


def cannot_write(path: Path, error: Exception) -> UserError:
    """Describe in one line what kept a file or folder from being written."""
    reason = (error.strerror if isinstance(error, OSError) else None) or (str(error).splitlines() or [repr(error)])[0]
    code = getattr(error, "errno", None)
    full = code in FULL_DISK or any(text in reason for text in ("No space left", "file write failed", "disk is full"))
    return UserError(f"{path} cannot be written: {reason:.200}" + ("; free some disk space" if full else ""))


def _open_new(path: Path) -> tuple[Path, BinaryIO]:
    """Open a temporary file for `path`, locked as long as it is open: `_remove_abandoned` then leaves it alone."""
    while True:
        unfinished = _temporary(path, "new")
        file = open(unfinished, "xb")  # x: a new file, never one that another user has put there
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if unfinished.exists():  # not removed between the two lines above
            return unfinished, file
        file.close()


def _remove_abandoned(path: Path) -> None:
    """Remove the unfinished files of `path` that killed processes have left; those of a living one are locked."""
    with suppress(OSError):  # as where the folder may not be read
        for left in path.parent.glob(".tmp-*-new-*"):
            match = TEMPORARY.fullmatch(left.name)
            if match and match["name"] == path.name and left.is_file() and not left.is_symlink():
                with suppress(OSError), open(left, "r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()


def _temporary(path: Path, age: str) -> Path:
    """Name what is not yet, or no longer, `path`."""
    return path.with_name(f".tmp-{secrets.token_hex(4)}-{age}-{path.name}")


def _apply_umask(folder: Path) -> None:
    """Give the files in a folder that was just made the permissions that the user's umask gave the folder itself."""
    allowed = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        with suppress(OSError):  # a file system without permissions
            if not path.is_symlink():
                path.chmod(allowed if path.is_dir() else allowed & 0o666)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk (folders: where the system can)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        atexit.register(copy.close)  # which removes it; the end of the interpreter alone does not always
        with open(path, "rb") as pipe:
            shutil.copyfileobj(pipe, copy)
        copy.flush()
    return Path(_copies[place].name)
