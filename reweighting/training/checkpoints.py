"""Checkpoints: the whole state of a run in `checkpoints/step-00000200/`, complete or absent.

    state.pt        everything that the rest of the run depends on; tensors, numbers, text and plain containers
    history.jsonl   the history up to this step
    prm/            the reward model of this step, to use as it is
    manifest.json   step, score and the SHA-256 of every other file

No file is trusted: checksums are compared first, and `state.pt` loads with `weights_only=True`, so that no code is
unpickled.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from reweighting.distributed import collectives
from reweighting.errors import UserError
from reweighting.files import atomic_write_dir, digest

STATE_FILE, HISTORY_FILE, MANIFEST_FILE, MODEL_FOLDER = "state.pt", "history.jsonl", "manifest.json", "prm"


class DamagedCheckpoint(UserError):
    """A checkpoint's files are not what its manifest says."""


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict,
    history: Path,
    save_model: Callable[[Path], None],
    score: tuple[str, float] | None = None,
) -> Path:
    """Write the checkpoint of `step` (optimizer steps) under `folder`, and return its place.

    save_model: writes the reward model into a folder. score: its name and value, larger is better.
    Raises UserError, leaving what was there before, if the disk takes no more.
    """
    place = folder / f"step-{step:08d}"

    def fill(aside: Path) -> None:
        with open(aside / STATE_FILE, "wb") as file:
            torch.save(state, file)
        shutil.copyfile(history, aside / HISTORY_FILE)
        save_model(aside / MODEL_FOLDER)
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = {"step": step, "files": {path.relative_to(aside).as_posix(): digest(path) for path in files}}
        if score is not None:
            manifest["score_name"], manifest["score"] = score
        (aside / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    try:
        atomic_write_dir(place, fill)
    except UserError as error:
        kept = ", ".join(path.name for path in checkpoints(folder)) or "none"
        raise UserError(f"{error}. Earlier checkpoints are whole: {kept}") from error
    return place


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest step first. Other things in it are left alone."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())


def read_manifest(place: Path) -> dict:
    """A checkpoint's manifest. Raises DamagedCheckpoint."""
    try:
        manifest = json.loads((place / MANIFEST_FILE).read_text(encoding="utf-8"))
        if isinstance(manifest["files"], dict) and int(manifest["step"]) >= 0:
            return manifest
        raise ValueError("it is no manifest")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DamagedCheckpoint(f"{place / MANIFEST_FILE} cannot be read: {error}") from error


def best_checkpoint(folder: Path, name: str) -> tuple[Path, float] | None:
    """The checkpoint with the largest score of this name (the newest of equals), and its score; None if none has."""
    best = None
    for place in checkpoints(folder):
        try:
            manifest = read_manifest(place)
        except DamagedCheckpoint:
            continue
        score = manifest.get("score", math.nan)
        if manifest.get("score_name") == name and (best is None or score >= best[1]):
            best = place, score
    return best


def remove_old(folder: Path, keep: int, score_name: str) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    best = best_checkpoint(folder, score_name)
    for place in checkpoints(folder)[:-keep]:
        if best is None or place != best[0]:
            doomed = place.with_name(f".{place.name}.doomed")  # renamed first: half of a checkpoint is never seen
            place.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def load_checkpoint(place: Path) -> dict:
    """The state of one checkpoint, its files compared with their checksums. Raises DamagedCheckpoint.

    Of several processes the main one calls it, and `load_state` the others.
    """
    manifest = read_manifest(place)
    for name, expected in manifest["files"].items():
        try:
            found = digest(place / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{place / name} cannot be read: {error.strerror}") from error
        if found != expected:
            raise DamagedCheckpoint(f"{place / name} is damaged: its checksum is not the manifest's")
    return load_state(place)


def load_state(place: Path) -> dict:
    """The state of a checkpoint that is known to be whole. Raises DamagedCheckpoint."""
    try:
        # Several processes read from one copy in memory, and of a sharded model only what is theirs.
        mapped = collectives.world_size() > 1
        return torch.load(place / STATE_FILE, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds
        raise DamagedCheckpoint(f"{place / STATE_FILE} cannot be loaded: {error}") from error


def load_latest(folder: Path, own: bool = True) -> tuple[Path, dict] | None:
    """The newest undamaged checkpoint under `folder` and its state; None if there is no checkpoint at all.

    A damaged one is reported and the one before it is taken; in the run's own folder it is then called
    `damaged-step-…`, so that it no longer counts as the newest. Raises UserError if all are damaged.
    """
    places, damaged = checkpoints(folder), []
    for place in reversed(places):
        try:
            found = place, load_checkpoint(place)
        except DamagedCheckpoint as error:
            print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr)
            damaged.append(place)
            continue
        for other in damaged if own else ():
            shutil.rmtree(other.with_name(f"damaged-{other.name}"), ignore_errors=True)
            other.rename(other.with_name(f"damaged-{other.name}"))
        return found
    if places:
        raise UserError(f"--resume: every checkpoint in {folder} is damaged: start anew without --resume")
    return None


def load_named(path: Path) -> tuple[Path, dict]:
    """The checkpoint at `path`, or the newest undamaged one of the run at `path`. Raises UserError if there is none."""
    if (path / MANIFEST_FILE).exists():
        return path, load_checkpoint(path)
    found = load_latest(path / "checkpoints", own=False) or load_latest(path, own=False)
    if found is None:
        raise UserError(f"--resume_from {path}: expected a checkpoint (a folder with {MANIFEST_FILE}) or a folder that "
                        "a run wrote")  # fmt: skip
    return found
