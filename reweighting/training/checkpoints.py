"""Checkpoints: the whole state of a run in `checkpoints/step-00000200/`, complete or absent.

    state.pt        all that the rest of the run depends on: tensors, numbers, text and plain containers
    history.jsonl   the history up to this step
    prm/            the reward model of this step, ready for use
    manifest.json   format version, step, score and the SHA-256 of every other file

No file is trusted. Checksums are compared first, `state.pt` loads with `weights_only=True`, so that no code is
unpickled, and what was loaded must have the form that `saved_state.py` describes.
"""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, StringConstraints, ValidationError

from reweighting.distributed import collectives
from reweighting.errors import UserError
from reweighting.files import atomic_write_dir, digest, open_regular, remove_dir
from reweighting.out_of_memory import is_out_of_memory
from reweighting.terminal import printable
from reweighting.training.saved_state import check_history, check_state

STATE_FILE, HISTORY_FILE, MANIFEST_FILE, MODEL_FOLDER = "state.pt", "history.jsonl", "manifest.json", "prm"
MAX_NAME = 256  # characters
FORMAT_VERSION = 4  # 1: settings under earlier names; 2: no evidence of the weights; 3: slopes in other units
# What the system says where a file is not there or is no file. Anything else, such as a lack of permission, says
# nothing about the file.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG)

T = TypeVar("T")
Score = tuple[str, float]  # name and value, larger is better


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are missing, changed, or not what a run writes."""


class Manifest(BaseModel):
    """The content of `manifest.json`. files: {path inside the checkpoint: SHA-256}."""

    model_config = ConfigDict(strict=True, frozen=True)

    format_version: NonNegativeInt = 1
    step: NonNegativeInt
    files: dict[str, Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]]
    score_name: str | None = None
    score: FiniteFloat | None = None


def checkpoint_name(step: int) -> str:
    """Name the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    history: Path,
    save_model: Callable[[Path], None],
    score: Score | None = None,
) -> Path:
    """Write a checkpoint.

    Args:
        folder: the folder of all checkpoints.
        step: optimizer steps made.
        state: what goes into `state.pt`.
        history: the file to copy as `history.jsonl`.
        save_model: writes the reward model into a folder.
        score: what the checkpoint may be kept for.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: if the disk refuses; what was there before is still there.
    """
    checkpoint_dir = folder / checkpoint_name(step)

    def fill(new: Path) -> None:
        with open(new / STATE_FILE, "wb") as file:
            torch.save(state, file)
        shutil.copyfile(history, new / HISTORY_FILE)
        save_model(new / MODEL_FOLDER)
        paths = sorted(path for path in new.rglob("*") if path.is_file())
        files = {path.relative_to(new).as_posix(): digest(path) for path in paths}
        manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "files": files}
        if score is not None:
            manifest["score_name"], manifest["score"] = score
        (new / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    try:
        atomic_write_dir(checkpoint_dir, fill)
    except UserError as error:
        kept = ", ".join(path.name for path in checkpoints(folder)) or "none"
        raise UserError(f"{error}. Then resume with --resume; complete checkpoints: {kept}") from error
    return checkpoint_dir


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest step first; anything else in it is ignored.

    Raises:
        UserError: if the folder cannot be read.
    """
    try:
        found = list(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    numbers = {path: path.name.removeprefix("step-") for path in found if path.name.startswith("step-")}
    steps = {path: int(number) for path, number in numbers.items() if number.isascii() and number.isdecimal()}
    return sorted(steps, key=lambda path: steps[path])


def read_manifest(checkpoint_dir: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        DamagedCheckpoint: if it is missing or not what a run writes.
        UserError: if it may not be read, or another version of this program wrote the checkpoint.
    """
    path = checkpoint_dir / MANIFEST_FILE
    manifest = _checked(path, lambda: Manifest.model_validate_json(_read(path)))
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(
            f"{checkpoint_dir} was written by another version of this program (checkpoint format "
            f"{manifest.format_version}; this version reads {FORMAT_VERSION}): resume that run with the version that "
            "started it, or start a new one"
        )
    names = manifest.files.keys()
    if outside := next((name for name in names if not _is_inside(name)), None):
        raise DamagedCheckpoint(f"{path} is damaged: it names {outside[:100]!r}, which is no file of the checkpoint")
    if missing := {STATE_FILE, HISTORY_FILE} - names:
        raise DamagedCheckpoint(f"{path} is damaged: it does not name {min(missing)}")
    return manifest


def _is_inside(name: str) -> bool:
    """Whether a file's name in a manifest leads to a place inside the checkpoint."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and len(name) < MAX_NAME and "\0" not in name


def best_checkpoint(folder: Path, name: str) -> tuple[Path, float] | None:
    """Find the checkpoint with the largest score of this name, the newest of equals.

    Returns:
        The checkpoint and its score; None if no undamaged manifest has one.
    """
    best = None
    for checkpoint_dir in checkpoints(folder):
        try:
            manifest = read_manifest(checkpoint_dir)
        except DamagedCheckpoint:
            continue
        if manifest.score is not None and manifest.score_name == name and (best is None or manifest.score >= best[1]):
            best = checkpoint_dir, manifest.score
    return best


def remove_old(folder: Path, keep: int, score_name: str) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    best = best_checkpoint(folder, score_name)
    for checkpoint_dir in checkpoints(folder)[:-keep]:
        if best is None or checkpoint_dir != best[0]:
            remove_dir(checkpoint_dir)


def load_checkpoint(checkpoint_dir: Path) -> dict[str, Any]:
    """Load the state of a checkpoint after comparing its files with their checksums.

    Of several processes, process 0 calls this and the others `load_state`.

    Raises:
        DamagedCheckpoint: if a file is missing, changed, or not what a run writes.
        UserError: if a file may not be read, or another version of this program wrote it.
    """
    manifest = read_manifest(checkpoint_dir)
    for name, expected in manifest.files.items():
        path = checkpoint_dir / name
        if _checked(path, lambda path=path: _digest(path)) != expected:
            raise DamagedCheckpoint(f"{path} is damaged: its checksum is not the manifest's")
    state = load_state(checkpoint_dir)
    history = checkpoint_dir / HISTORY_FILE
    _checked(checkpoint_dir / STATE_FILE, lambda: check_state(state, manifest.step))
    _checked(history, lambda: check_history(_read(history), manifest.step))
    return state


def load_state(checkpoint_dir: Path) -> dict[str, Any]:
    """Load the state of a checkpoint that is known to be undamaged.

    Raises:
        DamagedCheckpoint: if it cannot be loaded all the same.
    """
    path = checkpoint_dir / STATE_FILE
    # Several processes read from one copy in memory, and of a sharded model only what is theirs.
    mapped = collectives.world_size() > 1
    return _checked(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))


def _digest(path: Path) -> str:
    open_regular(path).close()  # a device might never end
    return digest(path)


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def _checked(path: Path, read: Callable[[], T]) -> T:
    """Call `read`, and raise DamagedCheckpoint where its error is one of the file at `path`."""
    try:
        return read()
    except UserError:
        raise
    except OSError as error:
        if error.errno not in NO_FILE:
            raise UserError(f"{path} cannot be read: {error.strerror}; nothing was changed") from error
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))[:100]
        raise DamagedCheckpoint(f"{path} is damaged: {field}: {first['msg']:.100}") from error
    except Exception as error:  # torch and the generators raise many kinds
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise DamagedCheckpoint(f"{path} is damaged: {reason:.200}") from error


def load_latest(folder: Path, own: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest undamaged checkpoint in a folder; each damaged one is reported.

    Args:
        folder: the folder of all checkpoints.
        own: whether it is this run's, where damaged checkpoints newer than the loaded one are renamed to
            `damaged-step-…`, so that they no longer count as the newest.

    Returns:
        The checkpoint and its state; None if there is no checkpoint at all.

    Raises:
        UserError: if all are damaged, one may not be read, or another version of this program wrote one.
    """
    found, damaged = checkpoints(folder), []
    for checkpoint_dir in reversed(found):
        try:
            state = load_checkpoint(checkpoint_dir)
        except DamagedCheckpoint as error:
            print(f"warning: {printable(error)}; trying the checkpoint before it", file=sys.stderr)
            damaged.append(checkpoint_dir)
            continue
        for other in damaged if own else ():
            shutil.rmtree(other.with_name(f"damaged-{other.name}"), ignore_errors=True)
            other.rename(other.with_name(f"damaged-{other.name}"))
        return checkpoint_dir, state
    if found:
        raise UserError(f"--resume: every checkpoint in {folder} is damaged: start a new run, without --resume")
    return None


def load_named(path: Path) -> tuple[Path, dict[str, Any]]:
    """Load the checkpoint at `path`, or the newest undamaged one of the run at `path`.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    if (path / MANIFEST_FILE).exists():
        return path, load_checkpoint(path)
    found = load_latest(path / "checkpoints", own=False) or load_latest(path, own=False)
    if found is None:
        raise UserError(f"--resume_from {path}: expected a checkpoint (a folder with {MANIFEST_FILE}) or a folder that "
                        "a run wrote")  # fmt: skip
    return found
