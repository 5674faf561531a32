"""sources.py: `--reward_model` on a saved reward model continues its training, or says why that cannot be."""

import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from reweighting.config.training import TrainingConfig
from reweighting.data.chains import Chain
from reweighting.errors import UserError
from reweighting.modeling.collate import collate
from reweighting.modeling.config import PRMConfig
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.training.build import load_backbone
from tests.tiny import build, tiny_backbone

QUESTION, STEPS = "How many red cells?", ("Step 1: two", "Step 2: so 3")
FLAGS = ["--train_json_file", "t", "--meta_json_file", "m", "--reward_model"]


def trained(folder, **settings) -> ProcessRewardModel:
    """A saved model all of whose trained weights have moved from their start."""
    torch.manual_seed(0)
    model = ProcessRewardModel.from_backbone(tiny_backbone(), **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def score(model: ProcessRewardModel) -> list[float]:
    return model.score(None, QUESTION, STEPS)


SETTINGS = [
    {"freeze_vision": True, "max_image_side": 40, "aggregation": "min"},
    {"lora_rank": 2, "lora_alpha": 8.0},
    {"train": "dora", "lora_rank": 2, "freeze_projector": False},
    {"train": "head", "max_length": 500},
    {"train": "head", "score_head": "mlp"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["full", "lora", "dora-projector", "head", "mlp"])
def test_training_continues_from_head_adapters_and_settings(tmp_path, capsys, settings):
    first = trained(tmp_path / "prm", **settings)
    capsys.readouterr()
    torch.manual_seed(9)  # a new head would differ
    second = ProcessRewardModel.from_backbone(tmp_path / "prm")
    out = capsys.readouterr().out
    adapters = f", its {first.config.train} adapters" if first.config.adapted else ""
    assert out == f"continuing from {tmp_path / 'prm'}: its head{adapters}, and its settings where none are given\n"
    assert second.training and score(second) == score(first)
    own = str(tmp_path / "prm") if first.config.train == "full" else first.config.backbone
    assert vars(second.config) == vars(first.config) | {"backbone": own}
    names = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (first, second)]
    assert names[0] == names[1]
    batch = collate([second.chain_tokenizer.encode(Chain(QUESTION, STEPS))])
    second(batch).sum().backward()
    second.save_pretrained(tmp_path / "again")
    assert score(ProcessRewardModel.from_pretrained(tmp_path / "again")) == score(first)
    assert all(
        p.device.type == "cpu" for p in ProcessRewardModel.from_backbone(tmp_path / "prm", device="meta").parameters()
    )


@pytest.mark.parametrize("more", [{"lora_rank": 2}, {"train": "dora"}, {"train": "head"}], ids=["lora", "dora", "head"])
def test_adapters_or_the_head_are_trained_on_a_model_that_was_trained_as_a_whole(tmp_path, more):
    first = trained(tmp_path / "prm", freeze_vision=True, aggregation="min")
    second = ProcessRewardModel.from_backbone(tmp_path / "prm", **more)
    assert score(second) == pytest.approx(score(first), abs=1e-6)
    assert second.config.aggregation == "min" and second.config.backbone == str(tmp_path / "prm")
    with torch.no_grad():
        second.score_head.weight.add_(1)
    second.save_pretrained(tmp_path / "again")
    assert score(ProcessRewardModel.from_pretrained(tmp_path / "again")) == score(second) != score(first)
    # Its base is the first model, and known as such.
    build(tmp_path / "other")
    (tmp_path / "prm" / "model.safetensors").unlink()
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "prm" / "model.safetensors")
    with pytest.raises(UserError, match="is not the one that the model was trained on"):
        ProcessRewardModel.from_pretrained(tmp_path / "again")


def test_a_frozen_model_with_a_trained_head_may_train_more(tmp_path):
    first = trained(tmp_path / "prm", train="head")
    for more in ({"train": "full"}, {"train": "lora"}):
        second = ProcessRewardModel.from_backbone(tmp_path / "prm", **more)
        assert score(second) == pytest.approx(score(first), abs=1e-6)
        assert second.config.backbone == str(tiny_backbone()) and second.config.train == more["train"]


@pytest.mark.parametrize(
    ("settings", "more", "flag"),
    [
        ({"lora_rank": 2}, {"train": "full"}, "--train full"),
        ({"lora_rank": 2}, {"train": "head"}, "--train head"),
        ({"lora_rank": 2}, {"train": "dora"}, "--train dora"),
        ({"lora_rank": 2}, {"lora_rank": 4}, "--lora_rank 4"),
        ({"lora_rank": 2}, {"lora_alpha": 4.0}, "--lora_alpha 4.0"),
        ({"lora_rank": 2, "freeze_projector": False}, {"freeze_projector": True}, "--freeze_projector True"),
        ({}, {"score_head": "linear_from_token"}, "--score_head linear_from_token"),
        ({"score_head": "mlp"}, {"score_head": "linear"}, "--score_head linear"),
    ],
)
def test_what_cannot_be_continued_is_refused(tmp_path, settings, more, flag):
    trained(tmp_path / "prm", **settings)
    with pytest.raises(UserError, match=f"{flag}: the reward model in .*prm has .* Leave the flag out, or start from"):
        ProcessRewardModel.from_backbone(tmp_path / "prm", **more)


def test_a_damaged_model_is_not_continued(tmp_path):
    trained(tmp_path / "prm")
    (tmp_path / "prm" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat_template.jinja' is missing"):
        ProcessRewardModel.from_backbone(tmp_path / "prm")


def test_the_command_takes_the_settings_of_the_saved_model_where_no_flag_is_given(tmp_path):
    settings = {"train": "lora", "lora_rank": 2, "lora_alpha": 8.0, "freeze_vision": True, "max_image_side": 40,
                "aggregation": "min", "max_length": 500}  # fmt: skip
    first = trained(tmp_path / "prm", **settings)
    config = TrainingConfig.parse([*FLAGS, str(tmp_path / "prm")])
    assert config.upper.aggregation_function == "min" and config.model.lora_rank == 2
    second = load_backbone(config, torch.device("cpu"), "fp32")
    assert second.config == first.config and score(second) == score(first)

    (tmp_path / "recipe.json").write_text('{"max_length": 300, "aggregation_function": "last"}')
    flags = [*FLAGS, str(tmp_path / "prm"), "--config", str(tmp_path / "recipe.json"), "--max_length", "200"]
    config = TrainingConfig.parse(flags)
    second = load_backbone(config, torch.device("cpu"), "fp32")
    assert second.config == PRMConfig(**{**vars(first.config), "max_length": 200, "aggregation": "last"})

    for more in (["--train", "full"], ["--train", "head"], ["--lora_rank", "4"]):
        with pytest.raises(UserError, match=f"{more[0]} {more[1]}: the reward model in .* has"):
            load_backbone(TrainingConfig.parse([*FLAGS, str(tmp_path / "prm"), *more]), torch.device("cpu"), "fp32")


@pytest.mark.parametrize("train", ["full", "head", "lora"])
def test_the_command_continues_a_fully_trained_model_in_any_way(tmp_path, train):
    first = trained(tmp_path / "prm", aggregation="min")  # all of it, the vision tower too
    config = TrainingConfig.parse([*FLAGS, str(tmp_path / "prm"), "--train", train])
    second = load_backbone(config, torch.device("cpu"), "fp32")
    assert second.config.train == train and second.config.aggregation == "min"
    assert second.config.freeze_vision == (train != "full")
    assert score(second) == pytest.approx(score(first), abs=1e-6)


def test_adapters_that_are_no_reward_model_are_recognised(tmp_path):
    base = AutoModel.from_pretrained(tiny_backbone())
    model = ProcessRewardModel.from_backbone(tiny_backbone(), lora_rank=2)
    assert isinstance(model.backbone, PeftModel)
    model.backbone.save_pretrained(str(tmp_path / "adapters"), save_embedding_layers=False)
    with pytest.raises(UserError, match="adapters holds adapters without a base: merge them"):
        ProcessRewardModel.from_backbone(tmp_path / "adapters")
    base.save_pretrained(tmp_path / "adapters")
    with pytest.raises(UserError, match="adapters holds adapters beside the model"):
        ProcessRewardModel.from_backbone(tmp_path / "adapters")
