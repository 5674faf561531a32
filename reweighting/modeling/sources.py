"""Decide where the parts of a reward model come from: a pretrained backbone, or a saved reward model.

A saved model's files and base are checked here, before any weight is loaded.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from reweighting.errors import UserError
from reweighting.modeling.adapters import required_files
from reweighting.modeling.config import ADAPTERS, CONFIG_FILE, PRMConfig, check_settings, with_defaults
from reweighting.modeling.loading import identify, is_gguf
from reweighting.modeling.saved_model import BaseIdentity, SavedModel

HEAD_FILE = "score_head.safetensors"


@dataclass(frozen=True)
class TrainedParts:
    """Name a saved reward model whose head, adapters and projector are taken over.

    Attributes:
        folder: the saved model's.
        config: its settings.
    """

    folder: Path
    config: PRMConfig


@dataclass(frozen=True)
class ModelSource:
    """Say where the parts of a reward model come from.

    Attributes:
        config: settings of the model.
        base_name: folder or hub name of the backbone.
        revision: commit of the backbone on the hub; None: the newest.
        base: identity of the backbone, if it is not saved with the model.
        processors: folder or hub name of tokenizer and image processor.
        trained: what is taken over from a saved model; None: the head is new.
    """

    config: PRMConfig
    base_name: str
    revision: str | None
    base: BaseIdentity | None
    processors: str
    trained: TrainedParts | None = None

    @property
    def description(self) -> str:
        """Say in one line what is taken over from a saved reward model."""
        if self.trained is None:
            return f"a new head on the backbone {self.base_name}"
        parts = f"its head, its {self.config.train} adapters" if self.trained.config.adapted else "its head"
        return f"continuing from {self.trained.folder}: {parts}, and its settings where none are given"


def new_source(
    name: str | Path, settings: dict[str, Any], dtype: torch.dtype, read_weights: bool = True
) -> ModelSource:
    """Prepare the training of a backbone, or of a saved reward model, which is then continued.

    Args:
        name: folder, GGUF file or hub name of a backbone, or folder of a saved reward model.
        settings: attributes of `PRMConfig`; None counts as not given.
        dtype: of a frozen base.
        read_weights: False: only the memory that the model would take is wanted.

    Returns:
        The source.

    Raises:
        UserError: settings contradict each other or the saved model, or files are missing or have changed.
    """
    folder = Path(name)
    try:
        is_folder = folder.is_dir()
    except (OSError, ValueError):  # a name too long for a path, or with a NUL character
        is_folder = False
    saved, trained = None, None
    if is_folder and (folder / CONFIG_FILE).is_file():
        saved = _read(folder, check_files=read_weights)
        trained = TrainedParts(folder, saved.config)
        settings = _continued(trained, settings)
    else:
        settings = {**settings, "backbone": str(folder.resolve() if is_folder or is_gguf(name) else name)}
    settings["dtype"] = str(dtype).removeprefix("torch.")
    config = PRMConfig(**with_defaults(settings))
    check_settings(config)
    try:
        TypeAdapter(PRMConfig).validate_python(asdict(config))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{first['loc'][0]}: {first['msg']}, found {first['input']!r:.60}") from error
    if config.train == "full" and dtype != torch.float32:
        raise UserError(
            f"a backbone that is trained as a whole must be float32, not {config.dtype}: at small "
            "learning rates half-precision parameters stop moving. Use autocast, or train adapters."
        )
    if config.train == "full" and is_gguf(config.backbone):
        raise UserError(
            f"{config.backbone}: a GGUF file holds quantized weights, which cannot be trained as a whole: use --train "
            "lora, dora or head"
        )
    base, revision = None, None
    if saved is not None and saved.config.train != "full":
        revision = _check_base(saved, config.backbone, allow_changed=not read_weights)
        base = saved.base
    if config.train != "full" and base is None and read_weights:
        base = identify(config.backbone)
    processors = config.backbone if trained is None else str(trained.folder)
    return ModelSource(config, config.backbone, revision, base, processors, trained)


def saved_source(folder: str | Path, backbone: str | Path | None, allow_changed_base: bool) -> ModelSource:
    """Prepare the use of a saved reward model.

    Args:
        folder: the saved model's.
        backbone: where the base of a model that was not trained as a whole is now, if it has moved.
        allow_changed_base: use the base even if it is not the one that the model was trained on.

    Returns:
        The source.

    Raises:
        UserError: files are missing or have changed, or the base has.
    """
    folder = Path(folder)
    saved = _read(folder)
    config, trained = saved.config, TrainedParts(folder, saved.config)
    if config.train == "full":
        return ModelSource(config, str(folder), None, None, str(folder), trained)
    base_name = str(backbone or config.backbone)
    try:
        revision = _check_base(saved, base_name, allow_changed_base)
        base = identify(base_name) if saved.base is None or allow_changed_base else saved.base
    except UserError as error:
        moved = " If the model's base has moved, name it with --backbone (from Python `backbone`)."
        hint = "" if Path(base_name).exists() else moved
        raise UserError(f"{folder}: {error}{hint}") from error
    return ModelSource(config, base_name, revision, base, str(folder), trained)


def _read(folder: Path, check_files: bool = True) -> SavedModel:
    """Read what a folder holds and check that it is complete."""
    saved = SavedModel.read(folder)
    for name in (HEAD_FILE, *required_files(saved.config)):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; the reward model was not saved completely.")
    if check_files:
        saved.check_files(folder)
    return saved


def _check_base(saved: SavedModel, name: str, allow_changed: bool) -> str | None:
    """Compare the base with the one that the model was trained on. Returns its commit if it comes from the hub."""
    if saved.base is None or allow_changed:
        return None
    if name == saved.config.backbone and saved.base.commit is not None and not Path(name).is_dir():
        return saved.base.commit  # the hub keeps what a commit holds
    if identify(name).digest != saved.base.digest:
        raise UserError(
            f"the base {name} is not the one that the model was trained on: its config or weights have changed. Name "
            "the original with --backbone (from Python `backbone`), or insist with --allow_changed_base (from Python "
            "`allow_changed_base=True`): scores change."
        )
    return None


def _continued(trained: TrainedParts, settings: dict[str, Any]) -> dict[str, Any]:
    """Merge a saved model's settings with those that are given. Raises UserError for what cannot be continued."""
    folder, saved = trained.folder, trained.config
    given = {name: value for name, value in settings.items() if value is not None}
    if not given.get("lora_rank"):
        given.pop("lora_rank", None)
    elif "train" not in given:
        given["train"] = "lora"
    fixed = ["score_head", "correct_token", "incorrect_token"]
    if saved.adapted:
        fixed += ["train", "lora_rank", "lora_alpha"]
        if saved.trains_projector:
            fixed.append("freeze_projector")
    for name in fixed:
        if name in given and given[name] != getattr(saved, name):
            raise UserError(
                f"--{name} {given[name]}: the reward model in {folder} has {getattr(saved, name)}, and training "
                f"continues from it. Leave the flag out, or start from a backbone (this one's is {saved.backbone})."
            )
    merged = asdict(saved) | given
    if merged["train"] not in ADAPTERS:
        merged["lora_rank"], merged["lora_alpha"] = 0, None
    merged["backbone"] = str(folder.resolve()) if saved.train == "full" else saved.backbone
    return merged
