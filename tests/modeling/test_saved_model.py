"""saved_model.py and sources.py: a saved model is used only with the files and the base that it was saved with."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from reweighting.errors import UserError
from reweighting.modeling.loading import identify
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.modeling.saved_model import SavedModel
from tests.tiny import accept_files, build, tiny_backbone

QUESTION, STEPS = "How many red cells?", ("Step 1: two", "Step 2: so 3")


def save(folder: Path, backbone: Path | None = None, **settings) -> ProcessRewardModel:
    torch.manual_seed(0)
    model = ProcessRewardModel.from_backbone(backbone or tiny_backbone(), **settings)
    torch.nn.init.normal_(model.score_head.weight)
    model.save_pretrained(folder)
    return model


def score(model: ProcessRewardModel) -> list[float]:
    return model.score(None, QUESTION, STEPS)


@pytest.fixture
def adapted(tmp_path) -> Path:
    """A LoRA model whose base is a folder of its own, `tmp_path / "base"`."""
    shutil.copytree(tiny_backbone(), tmp_path / "base")
    save(tmp_path / "prm", tmp_path / "base", lora_rank=2)
    return tmp_path / "prm"


# ---------------------------------------------------------------- the base


@pytest.mark.parametrize("settings", [{"lora_rank": 2}, {"train": "head"}], ids=["lora", "head"])
def test_a_replaced_base_is_refused_unless_insisted_on(tmp_path, settings):
    shutil.copytree(tiny_backbone(), tmp_path / "base")
    model = save(tmp_path / "prm", tmp_path / "base", **settings)
    assert score(ProcessRewardModel.from_pretrained(tmp_path / "prm")) == score(model)
    build(tmp_path / "other", seed=1)
    # Not written into the old file, which loaded models map into their memory.
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "base" / "model.safetensors")
    with pytest.raises(UserError, match="base .*base is not the one .*--allow_changed_base"):
        ProcessRewardModel.from_pretrained(tmp_path / "prm")
    changed = ProcessRewardModel.from_pretrained(tmp_path / "prm", allow_changed_base=True)
    assert score(changed) != score(model)
    # Named elsewhere, the original is still known as such.
    moved = ProcessRewardModel.from_pretrained(tmp_path / "prm", backbone=tiny_backbone())
    assert score(moved) == score(model)
    # Saved again, the model remembers the base that it has now.
    changed.save_pretrained(tmp_path / "again")
    assert score(ProcessRewardModel.from_pretrained(tmp_path / "again")) == score(changed)


def test_a_hub_model_is_loaded_at_the_commit_that_it_was_trained_on(tmp_path, monkeypatch):
    """The hub's files move on; what a commit holds does not."""
    repository, commits = tmp_path / "hub" / "models--some--model", ["a" * 40, "b" * 40]
    for seed, commit in enumerate(commits):
        build(repository / "snapshots" / commit, seed=seed)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[0])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = ProcessRewardModel.from_backbone("some/model", lora_rank=2)
    model.save_pretrained(tmp_path / "prm")
    assert SavedModel.read(tmp_path / "prm").base == identify("some/model") == model.base_identity
    assert model.base_identity.commit == commits[0]
    (repository / "refs" / "main").write_text(commits[1])
    loaded = ProcessRewardModel.from_pretrained(tmp_path / "prm")
    assert score(loaded) == score(model)
    # A copy in a folder is recognised by its content.
    with pytest.raises(UserError, match="is not the one"):
        ProcessRewardModel.from_pretrained(tmp_path / "prm", backbone=repository / "snapshots" / commits[1])
    ProcessRewardModel.from_pretrained(tmp_path / "prm", backbone=repository / "snapshots" / commits[0])


# ---------------------------------------------------------------- the files


LOST = ["chat_template.jinja", "tokenizer_config.json", "preprocessor_config.json", "tokenizer.json"]


@pytest.mark.parametrize("name", [*LOST, "adapter_config.json"])
def test_a_lost_or_changed_file_is_refused(adapted, name):
    path = adapted / name
    text = path.read_text()
    path.write_text(text + " ")
    with pytest.raises(UserError, match=f'{name} has changed since .*delete "files" from its prm_config.json'):
        ProcessRewardModel.from_pretrained(adapted)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}.* is missing"):
        ProcessRewardModel.from_pretrained(adapted)
    path.write_text(text)
    ProcessRewardModel.from_pretrained(adapted)


@pytest.mark.parametrize("name", ["model.safetensors", "score_head.safetensors"])
def test_other_weights_of_the_same_shapes_are_refused(tmp_path, name):
    save(tmp_path)
    tensors = load_file(tmp_path / name)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, tmp_path / name, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} has changed since the model was saved"):
        ProcessRewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["processor_config.json", "additional_chat_templates/default.jinja"])
def test_a_file_that_was_not_saved_is_refused(adapted, name):
    path = adapted / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"chat_template": "x"}')
    with pytest.raises(UserError, match=f"{name} was not saved with the model; move it away"):
        ProcessRewardModel.from_pretrained(adapted)
    path.unlink()
    (adapted / "README.md").write_text("Notes change nothing.")
    ProcessRewardModel.from_pretrained(adapted)


def test_a_changed_setting_is_refused_and_a_moved_backbone_is_not(adapted, tmp_path):
    path = adapted / "prm_config.json"
    values = json.loads(path.read_text())
    for change in ({"lora_alpha": 64.0}, {"max_image_side": 10}, {"base": None}):
        path.write_text(json.dumps(values | change))
        with pytest.raises(UserError, match="its settings have changed since"):
            ProcessRewardModel.from_pretrained(adapted)
    (tmp_path / "base").rename(tmp_path / "moved")
    path.write_text(json.dumps(values | {"backbone": str(tmp_path / "moved")}))
    ProcessRewardModel.from_pretrained(adapted)


def test_folders_of_earlier_versions_load_with_a_warning(adapted, capsys):
    expected = score(ProcessRewardModel.from_pretrained(adapted))
    assert "warning" not in capsys.readouterr().err
    path = adapted / "prm_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in ("files", "base")}))
    assert score(ProcessRewardModel.from_pretrained(adapted)) == expected
    assert capsys.readouterr().err.count("warning: ") == 1


def test_files_get_the_users_permissions(tmp_path):
    before = os.umask(0o007)
    try:
        save(tmp_path, freeze_vision=True)
        save(tmp_path / "lora", train="lora", freeze_projector=False)
    finally:
        os.umask(before)
    for folder in (tmp_path, tmp_path / "lora"):
        modes = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir() if path.is_file()}
        assert set(modes.values()) == {oct(0o660)}, modes


# ---------------------------------------------------------------- the schema


@pytest.mark.parametrize("content", ["[]", "1", "null", '"text"', "{", "[" * 5000, "", "\ufeff{}", '{"backbone": 1}'])
def test_a_config_that_is_no_object_or_lacks_its_backbone(adapted, content):
    (adapted / "prm_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="prm_config.json is damaged") as caught:
        ProcessRewardModel.from_pretrained(adapted)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "Tensor"), ("dtype", "nn"), ("dtype", "int8"), ("dtype", 1), ("train", ["lora"]),
        ("train", "x" * 9999), ("lora_rank", -1), ("lora_rank", "2"), ("lora_rank", 2.5), ("lora_rank", True),
        ("lora_alpha", 0), ("lora_alpha", float("nan")), ("max_length", 0), ("max_image_side", -5),
        ("freeze_vision", "no"),
        ("load_in_4bit", 1), ("aggregation", "median"), ("backbone", None), ("score_head", {}), ("base", "x"),
        ("base", {"digest": 1}), ("files", [1]), ("files", {"a": 1}), ("correct_token", "+"),
    ],
)  # fmt: skip
def test_a_setting_of_another_type_is_named(adapted, name, value):
    path = adapted / "prm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=f"prm_config.json is damaged: .*{name}") as caught:
        SavedModel.read(adapted)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_nothing_in_the_adapters_own_config_is_used(adapted):
    """A pattern that never ends, a type that peft does not know, a rank that fits no memory."""
    expected = score(ProcessRewardModel.from_pretrained(adapted))
    path = adapted / "adapter_config.json"
    values = json.loads(path.read_text())
    endless = "(a+)+" * 20 + "$"
    for change in (
        {"target_modules": endless},
        {"rank_pattern": {endless: 8}, "alpha_pattern": {endless: 1}},
        {"peft_type": "NONE"},
        {"r": 10**12},
        {"base_model_name_or_path": "nobody/nothing", "auto_mapping": {"parent_library": "os"}},
    ):
        path.write_text(json.dumps(values | change))
        accept_files(adapted)
        assert score(ProcessRewardModel.from_pretrained(adapted)) == expected
    path.write_text("[]")
    accept_files(adapted)
    assert score(ProcessRewardModel.from_pretrained(adapted)) == expected


def test_adapters_that_do_not_fit_the_settings_are_refused(adapted):
    tensors = load_file(adapted / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    for changed in (
        {key: tensor for key, tensor in tensors.items() if key != first},
        tensors | {"base_model.model.other.lora_A.weight": torch.zeros(2, 2)},
        tensors | {first: torch.zeros(3, 3)},
    ):
        save_file(changed, adapted / "adapter_model.safetensors")
        accept_files(adapted)
        with pytest.raises(UserError, match="a file of the saved reward model is damaged") as caught:
            ProcessRewardModel.from_pretrained(adapted)
        assert "\n" not in str(caught.value)


def test_a_huge_rank_is_refused_before_weights_are_read(tmp_path):
    with pytest.raises(UserError, match="--lora_rank 1000000000: more than the model's hidden size, 32"):
        ProcessRewardModel.from_backbone(tiny_backbone(), lora_rank=10**9)
