"""Ways to train: each trains what it says and nothing else, is saved and loaded to the bit; DoRA against its formula;
what is frozen, remembered and refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.utils import is_bitsandbytes_available

from reweighting.config.training import EMBEDDED_BACKBONE, TrainingConfig
from reweighting.data.chains import Chain
from reweighting.errors import UserError
from reweighting.modeling.collate import collate
from reweighting.modeling.config import PRMConfig
from reweighting.modeling.families import VISION_LANGUAGE
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.modeling.saved_model import SavedModel
from reweighting.training.build import load_backbone
from tests.tiny import accept_files, draw_cells, tiny_backbone
from tests.tiny_families import tiny_family

QUESTION, STEPS = "How many red cells are there?", ("Step 1: two in the first row", "Step 2: so 3 in all")
LINEAR = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
ADAPTED = [f"language_model.layers.{layer}.{name}" for layer in (0, 1) for name in LINEAR]
LORA = [f"{name}.lora_{letter}.default.weight" for name in ADAPTED for letter in "AB"]
DORA = LORA + [f"{name}.lora_magnitude_vector.default.weight" for name in ADAPTED]
HEAD = {"score_head.weight", "score_head.bias"}
MLP = {f"score_head.{layer}.{name}" for layer in ("hidden", "output") for name in ("weight", "bias")}


def of_backbone(*without: str, also: str = " ") -> set[str]:
    """Names of the backbone's parameters but for those that start so; and those that start with `also` in any case."""
    names = [name for name, _ in AutoModel.from_pretrained(tiny_backbone()).named_parameters()]
    return {f"backbone.{name}" for name in names if name.startswith(also) or not name.startswith(without)}


def in_peft(names, also=()) -> set[str]:
    return {f"backbone.base_model.model.{name}" for name in (*names, *also)}


def merger() -> list[str]:
    names = [name for name, _ in AutoModel.from_pretrained(tiny_backbone()).named_parameters()]
    return [name for name in names if name.startswith("visual.merger.")]


BF16 = {"dtype": torch.bfloat16}
# Settings -> the exact names of what is trained.
TRAIN_MODES = {
    "everything": ({}, lambda: of_backbone() | HEAD),
    "frozen-vision": ({"freeze_vision": True}, lambda: of_backbone("visual.") | HEAD),
    "frozen-tower": (
        {"freeze_vision": True, "freeze_projector": False},
        lambda: of_backbone("visual.", also="visual.merger.") | HEAD,
    ),
    "frozen-projector": ({"freeze_projector": True}, lambda: of_backbone("visual.merger.") | HEAD),
    "token": ({"score_head": "token", "freeze_vision": True}, lambda: of_backbone("visual.")),
    "lora": ({"train": "lora", "lora_rank": 2, **BF16}, lambda: in_peft(LORA) | HEAD),
    "lora-projector": (
        {"lora_rank": 2, "freeze_vision": True, "freeze_projector": False, **BF16},
        lambda: in_peft(LORA, merger()) | HEAD,
    ),
    "lora-token": ({"train": "lora", "score_head": "token"}, lambda: in_peft(LORA)),
    "dora": ({"train": "dora", "lora_rank": 2, **BF16}, lambda: in_peft(DORA) | HEAD),
    "mlp": ({"score_head": "mlp"}, lambda: of_backbone() | MLP),
    "lora-mlp": ({"train": "lora", "lora_rank": 2, "score_head": "mlp", **BF16}, lambda: in_peft(LORA) | MLP),
    "head-mlp": ({"train": "head", "score_head": "mlp", **BF16}, lambda: MLP),
    "head": ({"train": "head", "score_head": "linear_from_token", **BF16}, lambda: HEAD),
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The tiny backbone as one whose input embedding is its output embedding too."""
    folder = shutil.copytree(tiny_backbone(), tmp_path_factory.mktemp("tied"), dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """Two labeled chains, of which one has an image."""
    path = draw_cells(tmp_path_factory.mktemp("images") / "cells.png")
    return [Chain(QUESTION, STEPS, (path,), targets=(0.9, 0.1)), Chain(QUESTION, STEPS[:1], targets=(0.7,))]


def loss_of(model, chains) -> torch.Tensor:
    batch = model.collate([model.chain_tokenizer.encode(chain) for chain in chains])
    return (model(batch).sigmoid() - batch.targets)[batch.target_mask].square().mean()


def train(model, chains, steps=3) -> None:
    """As the lower level does, images and tokens remembered from step to step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        loss_of(model, chains).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("way", TRAIN_MODES)
def test_each_way_trains_what_it_says_and_is_saved_to_the_bit(chains, tied, tmp_path, way):
    settings, expected = TRAIN_MODES[way]
    torch.manual_seed(0)
    model = ProcessRewardModel.from_backbone(tied, **settings)
    if model.config.lora_rank:
        assert model.config.lora_rank == settings.get("lora_rank", 16)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16, enabled="dtype" in settings):
        train(model, chains)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved == expected()
    model.save_pretrained(tmp_path)
    loaded = ProcessRewardModel.from_pretrained(tmp_path)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == expected()
    assert torch.equal(loaded.chain_logits(chains)[0], model.chain_logits(chains)[0])
    assert loaded.config == model.config
    whole = model.config.train == "full"
    assert (tmp_path / "model.safetensors").exists() == whole
    assert (tmp_path / "adapter_model.safetensors").exists() == model.config.adapted
    train(loaded.train(), chains, steps=1)  # and it can be trained on


@pytest.mark.parametrize("settings", [{"freeze_vision": True}, {"lora_rank": 2, **BF16}], ids=["full", "lora"])
def test_no_stale_feature_is_used_while_the_projector_learns(chains, tmp_path, settings):
    model = ProcessRewardModel.from_backbone(tiny_backbone(), freeze_projector=False, **settings)
    before = model.chain_logits(chains)[0]
    for step in range(3):
        train(model, chains, steps=1)
        model.save_pretrained(tmp_path / str(step))
        anew = ProcessRewardModel.from_pretrained(tmp_path / str(step))  # has seen no image yet
        batch = collate([model.chain_tokenizer.encode(chain) for chain in chains])  # as training reads it
        with torch.no_grad():
            assert (model.eval()(batch) - anew.chain_logits(chains)[0]).abs().max() <= 1e-5
        model.train()
    # The test could fail: a projector of the start gives other scores.
    tensors = {n: p for n, p in ProcessRewardModel.from_backbone(tiny_backbone()).base.named_parameters()}
    now = model.chain_logits(chains)[0]
    model.base.load_state_dict({name: tensors[name] for name in merger()}, strict=False)
    assert (model.chain_logits(chains)[0] - now)[0].abs().max() > 1e-4
    assert (before - now).abs().max() > 1e-3


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_every_family_trains_its_projector_beside_adapters(chains, tmp_path, family):
    model = ProcessRewardModel.from_backbone(tiny_family(family), train="dora", freeze_projector=False, **BF16)
    projector = tuple(model.chain_tokenizer.family.projector_modules)
    expected = {n for n, _ in model.base.named_parameters() if n.startswith(projector) or "lora_" in n}
    assert {n for n, p in model.base.named_parameters() if p.requires_grad} == expected
    start = {name: p.clone() for name, p in model.base.named_parameters() if name in expected}
    with torch.autocast("cpu", torch.bfloat16):
        train(model, chains)
    assert not [name for name in expected if torch.equal(model.base.get_parameter(name), start[name])]
    model.save_pretrained(tmp_path)
    loaded = ProcessRewardModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.chain_logits(chains)[0], model.chain_logits(chains)[0])  # without autocast, too


def test_dora_is_its_formula(chains):
    """W' = m * V / |V| by rows, with V = W + alpha / r * B A (arXiv 2402.09353), put into a plain backbone."""
    torch.manual_seed(0)
    model = ProcessRewardModel.from_backbone(tiny_backbone(), train="dora", lora_rank=2, lora_alpha=8)
    plain = ProcessRewardModel.from_backbone(tiny_backbone())
    plain.score_head.load_state_dict(model.score_head.state_dict())
    assert (model.chain_logits(chains)[0] - plain.chain_logits(chains)[0]).abs().max() <= 1e-5  # at the start
    parameters = dict(model.base.named_parameters())
    with torch.no_grad():
        for name in ADAPTED:
            a, b = (parameters[f"{name}.lora_{letter}.default.weight"] for letter in "AB")
            magnitude = parameters[f"{name}.lora_magnitude_vector.default.weight"]
            b.normal_(std=0.1)
            magnitude.mul_(torch.rand_like(magnitude) + 0.5)
            v = parameters[f"{name}.base_layer.weight"] + 8 / 2 * b @ a
            plain.base.get_parameter(f"{name}.weight").copy_(magnitude[:, None] * v / v.norm(dim=1, keepdim=True))
    assert (model.chain_logits(chains)[0] - plain.chain_logits(chains)[0]).abs().max() <= 1e-4


def test_the_flags_reach_the_model(tied):
    flags = ["--train_json_file", "t", "--meta_json_file", "m", "--reward_model", str(tied), "--attention", "eager",
             "--train", "dora", "--lora_alpha", "8", "--no_freeze_projector", "--score_head", "token",
             "--correct_token", "S", "--incorrect_token", "t"]  # fmt: skip
    model = load_backbone(TrainingConfig.parse(flags), torch.device("cpu"), "bf16")
    assert model.base.config._attn_implementation == "eager"
    assert model.config == PRMConfig(
        backbone=str(tied), train="dora", lora_rank=16, lora_alpha=8.0, freeze_vision=True, freeze_projector=False,
        dtype="bfloat16", score_head="token", correct_token="S", incorrect_token="t",
    )  # fmt: skip
    assert TrainingConfig.parse([*flags[:6], "--freeze_projector", "--no_freeze_vision"]).model.freeze_projector is True
    assert (
        TrainingConfig.parse(flags[:6]).model.freeze_projector is None
        and TrainingConfig.parse(flags[:6]).model.train == "full"
    )


# ---------------------------------------------------------------- attention


def test_attention_backends_agree_and_eager_has_every_derivative(chains):
    torch.manual_seed(0)
    model = ProcessRewardModel.from_backbone(tiny_backbone(), freeze_vision=True)
    eager = ProcessRewardModel.from_backbone(tiny_backbone(), freeze_vision=True, attn_implementation="eager")
    eager.score_head.load_state_dict(model.score_head.state_dict())
    assert eager.base.config._attn_implementation == "eager"
    assert (model.chain_logits(chains)[0] - eager.chain_logits(chains)[0]).abs().max() <= 1e-5

    weight = model.base.language_model.layers[0].self_attn.q_proj.weight
    direction = torch.randn_like(weight)
    along = (torch.autograd.grad(loss_of(model, chains), weight)[0] * direction).sum()

    def loss_at(value):
        name = "backbone.language_model.layers.0.self_attn.q_proj.weight"
        batch = collate([model.chain_tokenizer.encode(chain) for chain in chains])
        z = torch.func.functional_call(model, {name: value}, (batch,))
        return (z.sigmoid() - batch.targets)[batch.target_mask].square().mean()

    with model.attention("eager"):
        assert model.base.language_model.config._attn_implementation == "eager"
        forward_mode = torch.func.jvp(loss_at, (weight.detach(),), (direction,))[1].item()
    assert forward_mode == pytest.approx(along.item(), rel=1e-4)
    with pytest.raises(ZeroDivisionError), model.attention("eager"):
        raise ZeroDivisionError
    assert model.base.config._attn_implementation == model.base.language_model.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "all"}, "--train: found all, allowed: full, lora, dora, head"),
        ({"score_head": "dense"}, "--score_head: found dense"),
        ({"train": "head", "lora_rank": 2}, "--lora_rank does nothing with --train head"),
        ({"train": "head", "freeze_projector": False}, "leave out --no_freeze_projector"),
        ({"train": "head", "score_head": "token"}, "nothing is trained: use --score_head linear_from_token"),
        ({"load_in_4bit": True}, "4-bit weights cannot be trained"),
        ({"train": "lora", "load_in_4bit": True}, r"a CUDA GPU \(the device is cpu\)"),
        ({"correct_token": "+"}, "--correct_token does nothing with --score_head linear"),
        ({"score_head": "mlp", "incorrect_token": "-"}, "--incorrect_token does nothing with --score_head mlp"),
        (BF16, "must be float32"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(UserError, match=message):
        ProcessRewardModel.from_backbone(tiny_backbone(), **settings)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and is_bitsandbytes_available()), reason="needs a CUDA GPU and bitsandbytes"
)
@pytest.mark.parametrize("way", ["lora", "dora", "head"])
def test_a_4bit_base_is_trained_around_and_loaded_to_the_bit(chains, tmp_path, way):
    settings = {"train": way, "load_in_4bit": True, "device": "cuda", "gradient_checkpointing": True, **BF16}
    model = ProcessRewardModel.from_backbone(EMBEDDED_BACKBONE, **settings)
    modules = model.base.named_modules()
    quantised = {name for name, module in modules if type(module).__module__.startswith("bitsandbytes")}
    assert len(quantised) == 6 * 7 and not any("visual" in name for name in quantised)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.autocast("cuda", torch.bfloat16):
        train(model, chains)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    loaded = ProcessRewardModel.from_pretrained(tmp_path, device="cuda")
    assert torch.equal(loaded.chain_logits(chains)[0], model.chain_logits(chains)[0])


def test_a_4bit_base_says_all_that_is_missing(monkeypatch):
    monkeypatch.setattr("reweighting.modeling.adapters.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match="a CUDA GPU .* and the package bitsandbytes .pip install bitsandbytes."):
        ProcessRewardModel.from_backbone(tiny_backbone(), train="dora", load_in_4bit=True)


def test_a_projector_that_is_missing_or_of_another_base(tmp_path):
    model = ProcessRewardModel.from_backbone(tiny_backbone(), train="lora", freeze_projector=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "projector.safetensors"
    tensors = load_file(path)
    for damage in ("visual.merger.other", None):
        tensors.pop(merger()[0], None)
        if damage:
            save_file(tensors | {damage: torch.zeros(1)}, path)
            accept_files(tmp_path)
            message = "a file of the saved reward model is damaged: .*does not fit the base"
        else:
            path.unlink()
            message = "projector.safetensors is missing"
        with pytest.raises(UserError, match=message):
            ProcessRewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"lora_rank": 4, "freeze_vision": True},
            {"train": "lora", "lora_rank": 4, "lora_alpha": 32.0, "freeze_vision": True},
        ),
        ({"lora_rank": 0, "freeze_vision": True, "later": 1}, {"train": "full", "freeze_vision": True}),
        ({"train": "dora", "lora_rank": 4}, {"train": "dora", "lora_rank": 4, "lora_alpha": 32}),
        ({"train": "backbone", "freeze_vision": True}, {"train": "full", "freeze_vision": True}),
        (
            {"train": "head", "base_4bit": True, "score_head": "linear_from_token", "right_token": "Y",
             "wrong_token": "N"},
            {"train": "head", "load_in_4bit": True, "score_head": "linear_from_token", "correct_token": "Y",
             "incorrect_token": "N"},
        ),
    ],
)  # fmt: skip
def test_configs_of_earlier_and_later_versions(tmp_path, old, new):
    (tmp_path / "prm_config.json").write_text(json.dumps({"backbone": "b", **old}))
    config = SavedModel.read(tmp_path).config
    assert config == PRMConfig(backbone="b", **new) and not config.trains_projector
    (tmp_path / "prm_config.json").write_text(json.dumps({"backbone": "b", "train": "nothing"}))
    with pytest.raises(UserError, match="damaged: train: Input should be 'full', 'lora', .*, found 'nothing'"):
        SavedModel.read(tmp_path)
