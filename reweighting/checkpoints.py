"""Checkpoints: the whole state of a run in `checkpoints/step-000500/state.pt`, written aside and renamed.

The state is tensors, numbers, text and plain containers: it loads with `weights_only=True`, so no code is unpickled.
"""

import hashlib
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch

from reweighting.errors import UserError

STATE_FILE = "state.pt"


def random_states() -> dict:
    """The states of python's, numpy's and torch's random generators, in types that load safely."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_states(state: dict) -> None:
    """Set the generators to what `random_states` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(folder: Path, step: int, state: dict) -> Path:
    """Write `state` as the checkpoint of `step` (optimizer steps) under `folder`, and return its place."""
    place = folder / f"step-{step:08d}"
    aside = folder / f".{place.name}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with open(aside / STATE_FILE, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(place, ignore_errors=True)
    aside.rename(place)
    return place


# Settings that may differ when a run resumes: they change no number that the run computes.
FREE_SETTINGS = ("weights_path", "save_every_iterations", "resume", "recipe", "device")


def check_same_run(state: dict, settings: dict) -> None:
    """Raise UserError if a checkpoint belongs to a run with other settings or data: what follows would be neither's.

    A larger --iteration_num is allowed where the learning rate does not depend on it.
    """
    saved = state["settings"]
    for name in saved.keys() | settings.keys():
        before, now = saved.get(name), settings.get(name)
        longer = name == "iteration_num" and settings["scheduler"] != "cosine" and now >= state["step"]
        if before != now and name not in FREE_SETTINGS and not longer:
            raise UserError(f"--resume: {name} was {before} when the checkpoint was saved and is {now} now")


def load_latest_checkpoint(folder: Path) -> dict:
    """The state of the newest checkpoint under `folder`. Raises UserError if there is none or it is damaged."""
    places = sorted(folder.glob("step-*"))
    if not places:
        raise UserError(f"--resume: there is no checkpoint in {folder}; leave --resume out to start anew")
    try:
        return torch.load(places[-1] / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(
            f"--resume: {places[-1]} is damaged ({error}); delete it to resume from an earlier one"
        ) from error


def digest(*files: Path) -> str:
    """A digest of the files' bytes, in this order."""
    together = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            together.update(hashlib.file_digest(file, "sha256").digest())
    return together.hexdigest()
