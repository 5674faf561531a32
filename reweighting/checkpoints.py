"""Checkpoints: the whole state of a run in `checkpoints/step-00000200/`, complete or absent.

    state.pt        everything that the rest of the run depends on; tensors, numbers, text and plain containers
    history.jsonl   the history up to this step
    prm/            the reward model of this step, to use as it is
    manifest.json   step, score and the SHA-256 of every other file

No file is trusted: checksums are compared first, and `state.pt` loads with `weights_only=True`, so that no code is
unpickled.
"""

import hashlib
import json
import math
import random
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from reweighting import processes
from reweighting.arguments import flag_defaults, learns_weights
from reweighting.errors import UserError
from reweighting.folders import write_folder_whole
from reweighting.prm_config import with_defaults

STATE_FILE, HISTORY_FILE, MANIFEST_FILE, MODEL_FOLDER = "state.pt", "history.jsonl", "manifest.json", "prm"


class DamagedCheckpoint(UserError):
    """A checkpoint's files are not what its manifest says."""


def random_states() -> dict:
    """The states of python's, numpy's and torch's random generators, in types that load safely."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        # Of several processes, each has a GPU of its own and leaves the others' alone.
        several = processes.world() > 1
        state["cuda"] = [torch.cuda.get_rng_state()] if several else torch.cuda.get_rng_state_all()
    return state


def set_random_states(state: dict) -> None:
    """Set the generators to what `random_states` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        if processes.world() > 1:
            torch.cuda.set_rng_state(state["cuda"][0])
        elif torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all(state["cuda"])


def own_random_states(states: list[dict]) -> None:
    """Set the generators of this process from those of all processes that saved them: its own, where there are as many
    now; else the main process goes on with its own, and the others with new ones."""
    rank = processes.rank()
    known = len(states) == processes.world()
    set_random_states(states[rank if known else 0])
    if rank and not known:
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)


def digest(*files: Path) -> str:
    """A digest of the files' bytes, in this order."""
    together = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            together.update(hashlib.file_digest(file, "sha256").digest())
    return together.hexdigest()


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
        write_folder_whole(place, fill)
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
        mapped = processes.world() > 1
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


# Settings that may differ when a run resumes: they change no number that the run computes.
FREE_SETTINGS = (
    "weights_path", "device", "reward_model", "image_root", "train_json_file", "meta_json_file", "validation_json_file",
    "validation", "iteration_num", "save_every_iterations", "keep_checkpoints", "skip_nonfinite",
    "planned_hypergradient",  # where --hypergradient auto took it from: a resumed run takes it over
)  # fmt: skip

BY_CONTENT = {"data": "training or meta data", "backbone": "backbone"}  # a setting that is a digest


def check_same_run(state: dict, settings: dict, allow_changes: bool) -> None:
    """Raise UserError if a checkpoint belongs to a run with other settings or data: what follows would be neither's.
    With `allow_changes`, tell of each change instead.

    Files may have moved: what counts is the content of the training and meta data and of a local backbone. Whether
    weights are learned cannot be changed at all.
    """
    # A flag that there was not yet had the effect of its default.
    saved, step = with_defaults(flag_defaults() | state["settings"]), state["step"]
    learned, learns = (learns_weights(Namespace(**one)) for one in (saved, settings))
    if learned != learns:
        ways = {True: "learns the domain weights", False: "trains with fixed weights (--baseline or --domain_weights)"}
        raise UserError(f"the checkpoint is of a run that {ways[learned]}, and this one {ways[learns]}: that cannot be "
                        "changed on the way. Start a run of its own, in another --weights_path")  # fmt: skip
    if settings["iteration_num"] < step:
        raise UserError(f"--iteration_num {settings['iteration_num']}: the checkpoint is at step {step} already")
    changes = []
    for name in sorted(state["settings"].keys() | settings.keys()):
        before, now = saved.get(name), settings.get(name)
        if name == "hypergradient" and now == "auto":  # which goes on in the way of the run so far
            continue
        if before != now and name not in FREE_SETTINGS:
            changes.append(f"the content of the {BY_CONTENT[name]} is not what it was" if name in BY_CONTENT
                           else f"{name} was {before} and is {now} now")  # fmt: skip
    if changes and not allow_changes:
        raise UserError(f"this is not the run of the checkpoint: {'; '.join(changes)}. Give the same settings and data,"
                        " or --allow_changed_settings if you mean it")  # fmt: skip
    for change in changes:
        print(f"--allow_changed_settings: since step {step}, {change}", file=sys.stderr)
