"""Which checkpoint a run resumes from, and what must agree with it."""

import os
import sys
from pathlib import Path
from typing import Any

from reweighting.config.training import TrainingConfig, flag_defaults
from reweighting.data.sources import Source, identity
from reweighting.devices import choose_device, choose_precision
from reweighting.distributed import collectives
from reweighting.errors import UserError
from reweighting.files import digest
from reweighting.modeling.config import CONFIG_FILE, with_defaults
from reweighting.modeling.saved_model import SavedModel
from reweighting.terminal import printable
from reweighting.training.checkpoints import load_latest, load_named, load_state

# Flags that say how a run is started, not what it computes.
STARTING = (
    "resume", "resume_from", "allow_changed_settings", "dry_run", "shard", "distributed_timeout", "step_states_dir",
)  # fmt: skip
# Flags that name a file or folder to read, beside those of the rows.
INPUTS = (
    "questions_json_file", "image_root", "reward_model", "domain_weights", "instance_weights", "step_states_dir",
)  # fmt: skip
# Settings that may differ when a run resumes: they change no number that the run computes.
FREE_SETTINGS = (
    "weights_path", "device", "reward_model", "image_root", "train_json_file", "mixture", "meta_json_file",
    "validation_json_file", "questions_json_file", "validation", "iteration_num", "save_every_iterations",
    "keep_checkpoints", "max_skipped_steps",
    "planned_hypergradient",  # what --hypergradient auto chose: a resumed run keeps to it
)  # fmt: skip
BY_CONTENT = {"data": "training or meta data", "backbone": "backbone"}  # a setting that is a digest


def run_inputs(config: TrainingConfig) -> dict[str, list[str]]:
    """List what the run reads: {what a message calls it: files and folders}.

    Raises:
        UserError: if --reward_model is a saved reward model that is damaged, or there is no such file.
    """
    flags, data = config.flags(), config.data
    inputs = {f"--{name}": [flags[name]] for name in INPUTS if flags[name] is not None}
    for name, files, mixture in (
        ("--train_json_file", data.train_json_file, data.mixture),
        ("--meta_json_file", data.meta_json_file, None),
        ("--validation_json_file", data.validation_json_file, None),
    ):
        inputs[name] = [source.path for source in config.reading.sources(files, mixture)]
    if (Path(config.model.reward_model) / CONFIG_FILE).is_file():
        base = SavedModel.read(Path(config.model.reward_model)).config.backbone
        inputs["the base of --reward_model"] = [] if base is None else [base]
    return inputs


def run_settings(config: TrainingConfig) -> dict[str, Any]:
    """Collect what a checkpoint remembers of a run.

    Returns:
        The flags that say what is computed, the precision that is used where none is given, and digests of the files
        that the flags name and of a local backbone: another file of the same name makes another run.

    Raises:
        UserError: if a file cannot be read, or the device is not there.
    """
    reading, files, backbone = config.reading, config.data, config.model.reward_model
    sources = reading.sources(files.train_json_file, files.mixture)
    if config.learns_weights:
        sources += reading.sources(files.meta_json_file)
    others = (config.lower.domain_weights, config.lower.instance_weights, reading.questions_json_file)
    sources += [Source(name) for name in others if name is not None]
    validation = reading.sources(files.validation_json_file)
    try:
        if os.path.isdir(backbone):
            parts = (path for path in Path(backbone).iterdir() if path.suffix in (".json", ".jinja", ".safetensors"))
            backbone = digest(*sorted(parts))
        elif os.path.isfile(backbone):  # GGUF
            backbone = digest(Path(backbone))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    flags = {name: value for name, value in config.flags().items() if name not in STARTING}
    return flags | {
        "backbone": backbone,
        "precision": choose_precision(config.run.precision, choose_device(config.run.device)),
        "data": identity(sources),
        "validation": identity(validation) if validation else None,
    }


def find_checkpoint(
    config: TrainingConfig, settings: dict[str, Any], folder: Path
) -> tuple[Path, dict[str, Any]] | None:
    """Find the checkpoint that the run resumes from. Moves nothing but what is damaged.

    Process 0 searches, and all processes read what it found.

    Args:
        config: the flags.
        settings: from `run_settings`.
        folder: the output folder.

    Returns:
        The checkpoint and its state; None if the run starts at step 0.

    Raises:
        UserError: if the checkpoint is missing, damaged or another run's.
    """
    if not collectives.is_rank0():
        checkpoint_dir = collectives.broadcast_object(None)
        return None if checkpoint_dir is None else (checkpoint_dir, load_state(checkpoint_dir))
    found = None
    if config.run.resume_from is not None:
        found = load_named(Path(config.run.resume_from))
    elif config.run.resume:
        found = load_latest(folder / "checkpoints")
        if found is None:
            print(f"--resume: there is no checkpoint in {printable(folder)} yet: starting at step 0")
    if found is not None:
        check_same_run(found[1], settings, config.run.allow_changed_settings)
        print(f"resuming from {printable(found[0])}")
    collectives.broadcast_object(None if found is None else found[0])
    return found


def check_same_run(state: dict[str, Any], settings: dict[str, Any], allow_changes: bool) -> None:
    """Compare a checkpoint's settings and data with those of this run: continuing would match neither otherwise.

    Files may have moved: the content of the data and of a local backbone counts. What is weighted, and whether the
    weights are learned, can never change; nor can the data where each chain has a weight or labels are corrected.

    Args:
        state: the checkpoint's state.
        settings: from `run_settings`.
        allow_changes: print each change instead of refusing.

    Raises:
        UserError: if they differ, or the checkpoint is beyond the last step.
    """
    # A flag that did not exist when the run was started had the effect of its default.
    saved, step = with_defaults(flag_defaults() | state["settings"]), state["step"]
    then, config = (TrainingConfig.from_flags(settings | one) for one in (saved, settings))
    if (kind := _kind(then)) != (new_kind := _kind(config)):
        raise UserError(
            f"the checkpoint is of a run that {kind}, and this one {new_kind}: a resumed run cannot change that. Start "
            "a new run in another --weights_path"
        )
    if (config.weighs_instances or config.corrects_labels) and saved.get("data") != settings.get("data"):
        raise UserError(
            f"the content of the {BY_CONTENT['data']} has changed since the checkpoint, and its weights or labels "
            "belong to the chains that it was then: give the same data, or start a new run in another --weights_path"
        )
    if settings["iteration_num"] < step:
        raise UserError(f"--iteration_num {settings['iteration_num']}: the checkpoint is at step {step} already")
    changes = []
    for name in sorted(state["settings"].keys() | settings.keys()):
        before, now = saved.get(name), settings.get(name)
        if name == "hypergradient" and now == "auto":  # resumes with the method of the run so far
            continue
        if before != now and name not in FREE_SETTINGS:
            changes.append(f"the content of the {BY_CONTENT[name]} has changed" if name in BY_CONTENT
                           else f"{name:.60} was {_short(before)} and is {_short(now)} now")  # fmt: skip
    if changes and not allow_changes:
        raise UserError(f"this is not the run of the checkpoint: {'; '.join(changes)}. Give the same settings and data,"
                        " or --allow_changed_settings to resume all the same")  # fmt: skip
    for change in changes:
        print(f"--allow_changed_settings: since step {step}, {printable(change)}", file=sys.stderr)


def _kind(config: TrainingConfig) -> str:
    """What a run does about weights, in words that follow "a run that"."""
    if config.learns_weights:
        upper = config.upper
        form = " --instance_weights_form net" if upper.instance_weights_form == "net" else ""
        labels = f" and corrects labels (--correct_labels {upper.correct_labels})" if config.corrects_labels else ""
        return f"learns the weights (--weights_for {upper.weights_for}{form}){labels}"
    return "trains with fixed weights (--baseline or a file)"


def _short(value: Any) -> str:
    return f"{value!s:.100}"
