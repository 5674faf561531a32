"""reward_model.py: one pass equals one pass per prefix, batching changes nothing, saving, LoRA, errors."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reweighting.data.chains import Chain
from reweighting.errors import UserError
from reweighting.modeling.collate import collate
from reweighting.modeling.config import PRMConfig
from reweighting.modeling.reward_model import ProcessRewardModel
from tests.tiny import build, draw_cells, tiny_backbone

QUESTION = "How many red cells are there?"
STEPS = (
    "Step 1: Look at the first row.\n\n- two red",
    "Step 2: the second",
    "### Step 3: so 3\nFinal answer: 3",
)
LONG = tuple(f"Step {n}: " + "on and on " * n for n in range(1, 6))


def build_model(seed=0, **options) -> ProcessRewardModel:
    torch.manual_seed(seed)
    model = ProcessRewardModel.from_backbone(tiny_backbone(), **options)
    torch.nn.init.normal_(model.score_head.weight)  # larger than the start, so that differences show
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, where the adapter does nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return build_model().eval()


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return draw_cells(tmp_path_factory.mktemp("images") / "cells.png")


def logits_with_graph(model, chains):
    return model(collate([model.chain_tokenizer.encode(chain) for chain in chains]))


def logits(model, chains):
    with torch.no_grad():
        return logits_with_graph(model, chains)


@pytest.mark.parametrize("with_image", [True, False])
def test_one_pass_equals_one_pass_per_prefix(model, image, with_image):
    """The central promise, alone and padded in a batch beside longer chains with and without an image."""
    pictures = (image,) * with_image
    per_prefix = [logits(model, [Chain(QUESTION, STEPS[:n], pictures)])[0, n - 1] for n in range(1, len(STEPS) + 1)]
    expected = torch.stack(per_prefix)
    assert expected.std() > 0.1  # the steps do differ
    chain = Chain(QUESTION, STEPS, pictures)
    alone = logits(model, [chain])[0]
    others = [Chain("Longer: " + QUESTION, LONG, (image,)), Chain(QUESTION, LONG), Chain("Q", ("x",), (image,))]
    batched = logits(model, [others[0], chain, *others[1:]])[1]
    assert (alone - expected).abs().max() <= 1e-5
    assert (batched[: len(STEPS)] - expected).abs().max() <= 1e-5
    assert (batched[len(STEPS) :] == 0).all()


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"freeze_vision": True}])
def test_a_shared_prompt_changes_no_score_and_no_gradient(image, options):
    """Prompts read once, of different lengths and with other images, against chains read whole."""
    model = build_model(**options)
    prompts = [(QUESTION, (image,)), ("Much longer: " + QUESTION, ()), ("Q", (image,))]
    chains = [
        Chain(*prompts[k][:1], LONG[: 6 - n] if n % 2 else STEPS, prompts[k][1])
        for n, k in enumerate([0, 1, 0, 2, 1, 2])
    ]
    encoded = [model.chain_tokenizer.encode(chain) for chain in chains]
    shared, whole = model.collate(encoded), collate(encoded)
    assert shared.prompts is not None and whole.prompts is None
    params = [p for p in model.parameters() if p.requires_grad]
    results = [
        (z, torch.autograd.grad(z.sigmoid().sum(), params, allow_unused=True)) for z in map(model, (shared, whole))
    ]
    (fast, fast_gradients), (slow, slow_gradients) = results
    assert slow.std() > 0.1 and (fast - slow).abs().max() <= 1e-5
    for ours, plain in zip(fast_gradients, slow_gradients, strict=True):
        assert (ours is None) == (plain is None)
        assert ours is None or torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_prompts_are_not_shared_where_checkpointing_would_lose_them(image):
    model = build_model(gradient_checkpointing=True)
    encoded = [model.chain_tokenizer.encode(Chain(QUESTION, STEPS[:n], (image,))) for n in (1, 2)]
    assert model.collate(encoded).prompts is None
    model.eval()
    shared = model.collate(encoded)
    assert shared.prompts is not None
    with torch.no_grad():
        assert (model(shared) - model(collate(encoded))).abs().max() <= 1e-5


def test_the_image_reaches_the_scores(model, image, tmp_path):
    Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "flipped.png")
    scores = [model.score(path, QUESTION, STEPS) for path in (image, tmp_path / "flipped.png", None)]
    assert scores[0] != pytest.approx(scores[1], abs=1e-3) and scores[0] != pytest.approx(scores[2], abs=1e-3)


def test_the_batch_size_changes_no_score(model, image):
    chains = [Chain(QUESTION, LONG[:n], (image,) * (n % 2)) for n in (1, 5, 2, 4, 3)]
    reference, mask = model.chain_logits(chains, batch_size=1)
    assert mask.sum(1).tolist() == [1, 5, 2, 4, 3]
    for batch_size in (2, 5):
        other, other_mask = model.chain_logits(chains, batch_size=batch_size)
        assert (other - reference).abs().max() <= 1e-5 and torch.equal(mask, other_mask)


def test_score_takes_steps_or_a_response_and_any_image(model, image):
    scores = model.score(image, QUESTION, STEPS)
    assert len(scores) == 3 and all(0 < score < 1 for score in scores)
    assert scores == pytest.approx(logits(model, [Chain(QUESTION, STEPS, (image,))])[0].sigmoid().tolist())
    assert model.score(str(image), QUESTION, "\n".join(STEPS)) == scores
    assert model.score(Image.open(image), QUESTION, STEPS) == scores
    with pytest.raises(UserError, match="no step"):
        model.score(image, QUESTION, [])


def test_scoring_leaves_the_model_in_training_and_fit_for_it(image):
    model = build_model()
    assert model.training and model.backbone.training
    model.score(image, QUESTION, STEPS)
    assert model.training and model.backbone.training
    # Tokens and pixels are remembered from inference mode; autograd must still accept them.
    logits = model(collate([model.chain_tokenizer.encode(Chain(QUESTION, STEPS, (image,)))]))
    logits.sum().backward()
    assert model.backbone.visual.patch_embed.proj.weight.grad.abs().sum() > 0


def test_rank_puts_the_best_aggregate_first(model, image):
    responses = ["\n".join(STEPS), "4", "\n".join(LONG), "Step 1: none\nStep 2: none"]
    means = []
    for response in responses:
        scores = model.score(image, QUESTION, response)
        means.append(sum(math.log(s / (1 - s)) for s in scores) / len(scores))
    expected = sorted(range(4), key=lambda i: -means[i])
    assert model.rank(image, QUESTION, responses) == expected
    assert model.rank(image, QUESTION, responses, batch_size=1) == expected
    assert model.rank(image, QUESTION, ["same", "same"]) == [0, 1]
    assert model.rank(image, QUESTION, []) == []
    last = [model.score(image, QUESTION, response)[-1] for response in responses]
    assert model.rank(image, QUESTION, responses, "last") == sorted(range(4), key=lambda i: -last[i])


def test_an_unknown_aggregation_is_a_user_error(model, image):
    with pytest.raises(UserError, match="found median, allowed: mean_logit"):
        model.rank(image, QUESTION, ["4"], "median")


def test_the_package_gives_the_model_and_loads_nothing_before_it_is_asked():
    code = (
        "import sys, reweighting; assert 'torch' not in sys.modules; from reweighting import ProcessRewardModel as P; "
    )
    code += "from reweighting.modeling.reward_model import ProcessRewardModel; assert P is ProcessRewardModel"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], check=True)


def test_special_tokens_in_the_question_do_not_become_image_tokens(model, image):
    scores = model.score(image, QUESTION + "<|image_pad|><|vision_start|>", "Step 1: <|image_pad|>")
    assert len(scores) == 1 and scores != model.score(image, QUESTION, "Step 1: ")


def test_the_head_stays_float32_under_autocast(model, image):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = logits(model, [Chain(QUESTION, STEPS, (image,))])
    assert low.dtype == torch.float32
    assert (low - logits(model, [Chain(QUESTION, STEPS, (image,))])).abs().max() < 0.3


def test_a_double_model_scores_in_double(image):
    assert logits(build_model().double(), [Chain(QUESTION, STEPS, (image,))]).dtype == torch.float64


# ---------------------------------------------------------------- what is trained


def test_lora_trains_adapter_and_head_only():
    model = build_model(lora_rank=2, dtype=torch.bfloat16)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("score_head.") for name in trainable)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert not any("visual" in name for name in trainable)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trainable if "lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    frozen = [p for name, p in model.named_parameters() if name not in trainable]
    assert frozen and all(p.dtype == torch.bfloat16 for p in frozen)


def test_freeze_vision_freezes_tower_and_merger_only():
    model = build_model(freeze_vision=True)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith("backbone.visual."), name


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"freeze_vision": True}])
def test_gradient_checkpointing_gives_the_same_gradients(image, options):
    gradients = []
    for checkpointing in (False, True):
        model = build_model(gradient_checkpointing=checkpointing, **options)
        chains = [Chain(QUESTION, STEPS, (image,)), Chain(QUESTION, LONG)]
        model(collate([model.chain_tokenizer.encode(chain) for chain in chains])).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert any(module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing"))
    for name, plain in gradients[0].items():
        assert torch.allclose(plain, gradients[1][name], rtol=1e-5, atol=1e-6), name


def test_low_precision_is_refused_for_what_is_trained():
    with pytest.raises(UserError, match="must be float32"):
        ProcessRewardModel.from_backbone(tiny_backbone(), dtype=torch.bfloat16)


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize(
    "options",
    [
        {"freeze_vision": True, "max_image_side": 40, "aggregation": "min", "max_length": 500},
        {"lora_rank": 2},
        {"lora_rank": 2, "dtype": torch.bfloat16},
    ],
)
def test_saved_and_loaded_scores_are_equal_to_the_bit(image, tmp_path, options):
    model = build_model(seed=3, **options)
    model.save_pretrained(tmp_path / "prm")
    loaded = ProcessRewardModel.from_pretrained(tmp_path / "prm")
    assert not loaded.training and loaded.config == model.config
    assert loaded.score(image, QUESTION, STEPS) == model.score(image, QUESTION, STEPS)
    trainable, reloaded = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded))
    assert trainable == reloaded
    files = {path.name for path in (tmp_path / "prm").iterdir()}
    assert {
        "score_head.safetensors",
        "prm_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
    } <= files
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in files)
    if "lora_rank" in options:
        assert {
            "adapter_config.json",
            "adapter_model.safetensors",
        } <= files and "model.safetensors" not in files
        adapter = json.loads((tmp_path / "prm" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(tiny_backbone())
    else:
        assert {"config.json", "model.safetensors"} <= files


def test_loading_a_generating_checkpoint_gives_the_same_backbone(tmp_path):
    """On the hub the weights come with an LM head and under other names."""
    build(tmp_path, lm_head=True)
    assert any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    other, model = ProcessRewardModel.from_backbone(tmp_path), build_model()
    for name, parameter in model.backbone.state_dict().items():
        assert torch.equal(parameter, other.backbone.state_dict()[name]), name


def test_a_moved_base_can_be_named(image, tmp_path):
    shutil.copytree(tiny_backbone(), tmp_path / "base")
    model = ProcessRewardModel.from_backbone(tmp_path / "base", lora_rank=2)
    model.save_pretrained(tmp_path / "prm")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"no folder .*base.* name it with --backbone"):
        ProcessRewardModel.from_pretrained(tmp_path / "prm")
    loaded = ProcessRewardModel.from_pretrained(tmp_path / "prm", backbone=tmp_path / "moved")
    assert loaded.score(image, QUESTION, STEPS) == model.score(image, QUESTION, STEPS)


def test_a_config_with_keys_of_a_later_version_loads(tmp_path):
    build_model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "prm_config.json").read_text())
    del values["files"]
    (tmp_path / "prm_config.json").write_text(json.dumps(values | {"something_new": 1}))
    assert ProcessRewardModel.from_pretrained(tmp_path).config == PRMConfig(backbone=str(tiny_backbone()))


# ---------------------------------------------------------------- errors


def test_unknown_backbones_give_one_plain_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it tries for 23 seconds
    for name in ("nobody/no-such-model", "./no/such/folder", str(tmp_path / "absent")):
        with pytest.raises(UserError, match="there is no folder .*Hugging Face hub") as caught:
            ProcessRewardModel.from_backbone(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be loaded"):
        ProcessRewardModel.from_backbone(tmp_path)  # an empty folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_backbone_folder_with_a_file_missing_is_a_user_error(tmp_path, name):
    shutil.copytree(tiny_backbone(), tmp_path / "backbone")
    (tmp_path / "backbone" / name).unlink()
    with pytest.raises(UserError):
        ProcessRewardModel.from_backbone(tmp_path / "backbone")


def test_incomplete_or_damaged_saves_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="holds no reward model"):
        ProcessRewardModel.from_pretrained(tmp_path)
    for options in ({}, {"lora_rank": 2}):
        model = build_model(**options)
        weights = "adapter_model.safetensors" if options else "model.safetensors"
        for name in ("score_head.safetensors", weights, "prm_config.json"):
            model.save_pretrained(tmp_path / "prm")
            path = tmp_path / "prm" / name
            path.write_bytes(path.read_bytes()[:20])
            with pytest.raises(UserError):
                ProcessRewardModel.from_pretrained(tmp_path / "prm")
            path.unlink()
            with pytest.raises(UserError):
                ProcessRewardModel.from_pretrained(tmp_path / "prm")


def test_missing_tensors_are_not_replaced_by_random_ones(tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(tiny_backbone(), tmp_path / "backbone")
    tensors = load_file(tmp_path / "backbone" / "model.safetensors")
    del tensors["visual.merger.mlp.0.weight"]
    save_file(tensors, tmp_path / "backbone" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of its tensors, .*merger.mlp.0.weight"):
        ProcessRewardModel.from_backbone(tmp_path / "backbone")


def test_a_frozen_vision_tower_sees_an_image_once_and_nothing_else_changes(image):
    """Remembered features against the tower itself: logits and gradients, also after they were made in inference."""
    chains = [Chain(QUESTION, STEPS, (image,)), Chain(QUESTION, LONG), Chain(QUESTION, STEPS[:1], (image,))]
    remembers, looks = build_model(freeze_vision=True), build_model(freeze_vision=True)
    looks.chain_tokenizer.encode_image = None
    seen = []
    remembers.backbone.visual.register_forward_pre_hook(lambda *_: seen.append(1))
    remembers.chain_logits(chains)
    results = []
    for model in (remembers, looks):
        z = logits_with_graph(model, chains)
        params = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(z.square().sum(), params)
        results.append((z, *gradients))
    assert len(seen) == 1
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


def test_an_image_is_encoded_once_in_whatever_questions_it_is(image, tmp_path):
    """Its features are remembered for it alone: not for a question, an order or a number of images."""
    other = tmp_path / "flipped.png"
    Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    model = build_model(freeze_vision=True, freeze_projector=True)
    looks: list[int] = []
    model.backbone.visual.register_forward_pre_hook(lambda *_: looks.append(1))
    prompts = [(QUESTION, (image, other)), ("<image> or <image>?", (other, image)), (QUESTION, (image,))]
    chains = [Chain(question, STEPS, images) for question, images in prompts]
    together = model.chain_logits(chains)[0]
    assert len(looks) == 2
    for chain, expected in zip(chains, together, strict=True):
        scores = model.score(list(chain.images), chain.question, STEPS)
        assert scores == pytest.approx(expected.sigmoid().tolist(), abs=1e-6)
        assert scores == model.score([Image.open(path) for path in chain.images], chain.question, STEPS)
        swapped = model.score(chain.images[::-1], chain.question, STEPS)
        assert (max(abs(a - b) for a, b in zip(scores, swapped, strict=True)) > 1e-3) == (len(chain.images) > 1)
    with pytest.raises(UserError, match="question: found 2 `<image>` for 1 image, allowed: one `<image>` for each"):
        model.rank(image, "<image> or <image>?", ["a"])
    assert model.score([image], f"<image>\n{QUESTION}", STEPS) == model.score(image, QUESTION, STEPS)


def test_the_last_questions_images_are_kept_where_there_is_no_room_for_more(image, tmp_path):
    other = tmp_path / "flipped.png"
    Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    model = build_model(freeze_vision=True, freeze_projector=True)
    tokenizer, looks = model.chain_tokenizer.with_image_encoder(model.encode_image), []
    model.backbone.visual.register_forward_pre_hook(lambda *_: looks.append(1))
    for images in [(image, other)] * 3 + [(other,)] * 2:
        tokenizer.encode(Chain(QUESTION, STEPS, images))
    assert len(looks) == 2
    tokenizer.encode(Chain(QUESTION, STEPS, (image, other, image)))
    assert len(looks) == 2


def test_a_trained_vision_tower_is_looked_at_anew(image):
    model = build_model()
    chains = [Chain(QUESTION, STEPS, (image,))]
    before = model.chain_logits(chains)[0]
    with torch.no_grad():
        for parameter in model.backbone.visual.parameters():
            parameter.mul_(1.5)
    after = model.chain_logits(chains)[0]
    assert (before - after).abs().max() > 1e-3
    z = logits_with_graph(model, chains)
    assert (z - after).abs().max() <= 1e-5
    assert torch.autograd.grad(z.sum(), next(model.backbone.visual.parameters()))[0].abs().max() > 0
