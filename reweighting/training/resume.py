"""How a run starts or goes on: what a checkpoint must agree with, which one it is, and the folder made ready."""

import os
import sys
from pathlib import Path

from reweighting.config.training import TrainingConfig, flag_defaults
from reweighting.devices import choose_device, choose_precision
from reweighting.distributed import collectives
from reweighting.errors import UserError
from reweighting.files import digest
from reweighting.modeling.config import with_defaults
from reweighting.training.checkpoints import load_latest, load_named, load_state

# Flags: how a run is started.
STARTING = ("recipe", "resume", "resume_from", "allow_changed_settings", "dry_run", "shard", "distributed_timeout")


def run_settings(config: TrainingConfig) -> dict:
    """What a checkpoint remembers of a run: the flags that say what is computed, not how it is started; the precision
    that is meant where none is given; and digests of the JSON files' and a local backbone's bytes, since another file
    of the same name is another run. Raises UserError if a file cannot be read, or the device is not there."""
    names = (
        [config.data.train_json_file, config.data.meta_json_file]
        if config.learns_weights
        else [config.data.train_json_file]
    )
    if config.lower.domain_weights is not None:
        names.append(config.lower.domain_weights)
    try:
        data = digest(*map(Path, names))
        validation = (
            None if config.data.validation_json_file is None else digest(Path(config.data.validation_json_file))
        )
        backbone = config.model.reward_model
        if os.path.isdir(backbone):
            files = (path for path in Path(backbone).iterdir() if path.suffix in (".json", ".jinja", ".safetensors"))
            backbone = digest(*sorted(files))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    flags = {name: value for name, value in config.flags().items() if name not in STARTING}
    return flags | {
        "backbone": backbone,
        "precision": choose_precision(config.run.precision, choose_device(config.run.device)),
        "data": data,
        "validation": validation,
    }


def find_checkpoint(config: TrainingConfig, settings: dict, folder: Path) -> tuple[Path, dict] | None:
    """The checkpoint that a run goes on from, and its state; None at a start. Moves nothing but what is damaged.

    settings: from `run_settings`. Raises UserError if the checkpoint is missing, damaged or another run's. Of several
    processes the main one looks, and all read what it has found.
    """
    if not collectives.is_rank0():
        place = collectives.broadcast_object(None)
        return None if place is None else (place, load_state(place))
    found = None
    if config.run.resume_from is not None:
        found = load_named(Path(config.run.resume_from))
    elif config.run.resume:
        found = load_latest(folder / "checkpoints")
        if found is None:
            print(f"--resume: there is no checkpoint in {folder} yet: starting at step 0")
    if found is not None:
        check_same_run(found[1], settings, config.run.allow_changed_settings)
        print(f"going on from {found[0]}")
    collectives.broadcast_object(None if found is None else found[0])
    return found


# Settings that may differ when a run resumes: they change no number that the run computes.
FREE_SETTINGS = (
    "weights_path", "device", "reward_model", "image_root", "train_json_file", "meta_json_file", "validation_json_file",
    "validation", "iteration_num", "save_every_iterations", "keep_checkpoints", "max_skipped_steps",
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
    learned, learns = (TrainingConfig.from_flags(one).learns_weights for one in (saved, settings))
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
