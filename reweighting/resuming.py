"""How a run starts or goes on: what a checkpoint must agree with, which one it is, and the folder made ready."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

from reweighting import processes
from reweighting.arguments import learns_weights
from reweighting.checkpoints import HISTORY_FILE, check_same_run, digest, load_latest, load_named, load_state
from reweighting.devices import choose_device, choose_precision
from reweighting.errors import UserError
from reweighting.folders import set_aside, write_folder_whole, write_whole

# Flags: how a run is started.
STARTING = ("recipe", "resume", "resume_from", "allow_changed_settings", "dry_run", "shard")


def run_settings(args: Namespace) -> dict:
    """What a checkpoint remembers of a run: the flags that say what is computed, not how it is started; the precision
    that is meant where none is given; and digests of the JSON files' and a local backbone's bytes, since another file
    of the same name is another run. Raises UserError if a file cannot be read, or the device is not there."""
    names = [args.train_json_file, args.meta_json_file] if learns_weights(args) else [args.train_json_file]
    if args.domain_weights is not None:
        names.append(args.domain_weights)
    try:
        data = digest(*map(Path, names))
        validation = None if args.validation_json_file is None else digest(Path(args.validation_json_file))
        backbone = args.reward_model
        if os.path.isdir(backbone):
            files = (path for path in Path(backbone).iterdir() if path.suffix in (".json", ".jinja", ".safetensors"))
            backbone = digest(*sorted(files))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    flags = {name: value for name, value in vars(args).items() if name not in STARTING}
    return flags | {
        "backbone": backbone,
        "precision": choose_precision(args.precision, choose_device(args.device)),
        "data": data,
        "validation": validation,
    }


def find_checkpoint(args: Namespace, settings: dict, folder: Path) -> tuple[Path, dict] | None:
    """The checkpoint that a run goes on from, and its state; None at a start. Moves nothing but what is damaged.

    settings: from `run_settings`. Raises UserError if the checkpoint is missing, damaged or another run's. Of several
    processes the main one looks, and all read what it has found.
    """
    if not processes.is_main():
        place = processes.from_main(None)
        return None if place is None else (place, load_state(place))
    found = None
    if args.resume_from is not None:
        found = load_named(Path(args.resume_from))
    elif args.resume:
        found = load_latest(folder / "checkpoints")
        if found is None:
            print(f"--resume: there is no checkpoint in {folder} yet: starting at step 0")
    if found is not None:
        check_same_run(found[1], settings, args.allow_changed_settings)
        print(f"going on from {found[0]}")
    processes.from_main(None if found is None else found[0])
    return found


def take_over(args: Namespace, folder: Path, place: Path | None) -> None:
    """Make the output folder ready for a run that starts (place None) or goes on from the checkpoint at `place`.

    What an earlier run left is moved aside, but with --resume; history goes back to the checkpoint. A checkpoint from
    elsewhere is copied, so that --resume finds it from the first moment on. The main process does all this.
    """
    if not processes.is_main():
        return
    if place is None:
        set_aside(folder)
        (folder / "checkpoints").mkdir(exist_ok=True)  # now, not at the first save: it might not be possible
        return
    history = (place / HISTORY_FILE).read_text(encoding="utf-8")
    if args.resume_from is not None:
        waiting = folder / ".taken-over"
        write_folder_whole(waiting, lambda aside: shutil.copytree(place, aside, dirs_exist_ok=True))
        set_aside(folder)
        (folder / "checkpoints").mkdir()
        waiting.rename(folder / "checkpoints" / place.name)
    write_whole(folder / HISTORY_FILE, history)
