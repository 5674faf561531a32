"""Keep track of what a saved reward model consists of: settings, files and base, in its `prm_config.json`.

The settings alone do not determine the scores: these also change if the chat template gets lost, or if the weights of a
base that was not trained are replaced. So the digest of each file is kept, and that of the base.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from reweighting.errors import UserError
from reweighting.files import digest
from reweighting.modeling.config import CONFIG_FILE, PRMConfig, check_settings, with_defaults
from reweighting.terminal import printable

MAX_CONFIG_BYTES = 2**20
WAY_OUT = f'To use the folder as it is, whatever the scores then are: delete "files" from its {CONFIG_FILE}.'
READ_SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt")  # of files that transformers may read
RENAMED_KEYS = {"base_4bit": "load_in_4bit", "right_token": "correct_token", "wrong_token": "incorrect_token"}


@dataclass(frozen=True)
class BaseIdentity:
    """Identify the pretrained weights that a reward model was trained on.

    Attributes:
        digest: of `config.json` and the weights.
        commit: of a model on the Hugging Face hub; None for a folder.
    """

    digest: str
    commit: str | None = None


@dataclass(frozen=True)
class SavedModel:
    """Hold the content of `prm_config.json`.

    Attributes:
        config: the model's settings.
        base: the weights that it was trained on, if they are not saved with it; None in folders of earlier versions.
        files: digest of each file in the folder, and of these settings; None in folders of earlier versions.
    """

    config: PRMConfig
    base: BaseIdentity | None = None
    files: dict[str, str] | None = None

    @classmethod
    def read(cls, folder: Path) -> "SavedModel":
        """Read `prm_config.json`, as this version, an earlier or a later one wrote it.

        Args:
            folder: of a saved reward model.

        Returns:
            The content. Keys of a later version are left out, names of an earlier one are translated.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise UserError(f"{folder} holds no reward model: it has no {CONFIG_FILE}. Name a folder a run saved.")
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise UserError(f"it has more than {MAX_CONFIG_BYTES} bytes")
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise UserError(f"expected an object, found {_short(values)}")
            known = {field.name for field in fields(PRMConfig)}
            settings = {key: value for key, value in _translated(values).items() if key in known}
            # From JSON, because pydantic's strict mode takes no dict for a dataclass.
            config = TypeAdapter(PRMConfig).validate_json(json.dumps(with_defaults(settings)), strict=True)
            check_settings(config)
            rest = {"config": config, "base": values.get("base"), "files": values.get("files")}
            saved = TypeAdapter(cls).validate_python(rest)
            if saved.files is not None and saved.files.get(CONFIG_FILE) != _settings_digest(values):
                raise UserError(f"its settings have changed since the model was saved. {WAY_OUT}")
            return saved
        except ValidationError as error:
            first = error.errors()[0]
            name, found = printable(".".join(map(str, first["loc"])), one_line=True)[:60], _short(first["input"])
            raise UserError(f"{path} is damaged: {name}: {first['msg']}, found {found}") from error
        except (ValueError, RecursionError, UserError) as error:
            raise UserError(f"{path} is damaged: {error}") from error

    @classmethod
    def write(cls, folder: Path, config: PRMConfig, base: BaseIdentity | None) -> None:
        """Write `prm_config.json` for a folder whose other files are complete.

        Gives all files the permissions of this one, which are the user's: safetensors files come with others.

        Args:
            folder: of the saved model.
            config: its settings.
            base: the weights that it was trained on, if they are not saved with it.
        """
        path = folder / CONFIG_FILE
        files = {name: digest(folder / name) for name in sorted(_files(folder))}
        content = asdict(config) | {"base": base and asdict(base)}
        content["files"] = files | {CONFIG_FILE: _settings_digest(content)}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name in files:
            (folder / name).chmod(path.stat().st_mode & 0o777)

    def check_files(self, folder: Path) -> None:
        """Check that the folder holds the files that were saved, and no others that transformers would read.

        Args:
            folder: of the saved model.

        Raises:
            UserError: a file is missing, has changed or is new.
        """
        if self.files is None:
            print(f"warning: {folder} holds no digests of its files, as an earlier version saved it: a changed or "
                  "missing file would go unnoticed", file=sys.stderr)  # fmt: skip
            return
        found = {CONFIG_FILE, *_files(folder)}
        for name in sorted(self.files.keys() - found):
            raise UserError(f"{folder}: {_short(name)} is missing; copy the whole folder again. {WAY_OUT}")
        for name in sorted(found - {CONFIG_FILE}):
            shown = printable(name, one_line=True)
            if name not in self.files:
                raise UserError(f"{folder}: {shown} was not saved with the model; move it away. {WAY_OUT}")
            if digest(folder / name) != self.files[name]:
                raise UserError(
                    f"{folder}: {shown} has changed since the model was saved; copy the whole folder again. {WAY_OUT}"
                )


def flags_of_saved(name: str, train: str | None) -> dict[str, Any]:
    """Read the settings of a saved reward model as flags of the training command.

    Args:
        name: value of --reward_model.
        train: value of --train, if it is given.

    Returns:
        Defaults of the flags that describe the model; empty if `name` is no folder of a saved reward model.

    Raises:
        UserError: it is one, and its settings are damaged.
    """
    folder = Path(name)
    if "\0" in name or not (folder / CONFIG_FILE).is_file():
        return {}
    settings = asdict(SavedModel.read(folder).config)
    del settings["backbone"], settings["dtype"]
    settings["aggregation_function"] = settings.pop("aggregation")
    if train not in (None, settings["train"]):
        for flag in ("train", "lora_rank", "lora_alpha", "load_in_4bit", "freeze_projector"):
            del settings[flag]
    if (train or settings["train"]) != "full":
        settings["freeze_vision"] = True
    return settings


def _files(folder: Path) -> Iterator[str]:
    """List the files that transformers may read, by their names relative to the folder."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and name.suffix in READ_SUFFIXES and name.name != CONFIG_FILE and path.is_file():
            yield name.as_posix()


def _settings_digest(values: dict[str, Any]) -> str:
    """Digest all settings but `backbone`: one that has moved may be named by hand, since `base` identifies it."""
    settings = {key: value for key, value in values.items() if key not in ("files", "backbone")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _translated(values: dict[str, Any]) -> dict[str, Any]:
    """Rename the keys and values that earlier versions wrote."""
    values = {RENAMED_KEYS.get(key, key): value for key, value in values.items()}
    if values.get("train") == "backbone":
        values["train"] = "full"
    return values


def _short(value: object) -> str:
    """Show a value of a file, shortened."""
    return f"{repr(value)[:60]}"
