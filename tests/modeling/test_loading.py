"""loading.py and tokenization.py: what is loaded, what never runs, and what is refused before weights are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from reweighting.errors import UserError
from reweighting.modeling import loading
from reweighting.modeling.loading import weight_files
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.modeling.score_head import random_head
from tests.tiny import tiny_backbone
from tests.tiny_families import TEXT_FAMILIES, TINY_FAMILIES, tiny_family


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the tiny backbone that a test may change."""
    return shutil.copytree(tiny_backbone(), tmp_path / "backbone")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def no_weights(monkeypatch):
    """Fail if weights are opened: what is refused must be refused before."""

    def refuse(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "safe_open", refuse)
    monkeypatch.setattr(loading.AutoModel, "from_pretrained", refuse)


# ---------------------------------------------------------------- names of tensors


@pytest.mark.parametrize("layout", ["as saved", "generating", "base"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_layout_that_the_generating_class_loads_is_loaded(tmp_path, family, layout):
    """`generating`, `base`: the names in these classes' own state dicts, as FSDP and DeepSpeed tools write them."""
    source = tiny_family(family)
    kind = AutoModelForCausalLM if family in TEXT_FAMILIES else AutoModelForImageTextToText
    model = kind.from_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    if layout != "as saved":
        tensors = (model if layout == "generating" else model.model).state_dict()
    shutil.copytree(source, tmp_path / "backbone")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "backbone" / "model.safetensors", metadata={"format": "pt"})
    assert layout != "generating" or any(name.startswith("model.") for name in tensors)
    prm = ProcessRewardModel.from_backbone(tmp_path / "backbone")
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(prm.backbone.state_dict()[name], tensor), name
    if layout != "generating":
        return
    lora = ProcessRewardModel.from_backbone(tmp_path / "backbone", lora_rank=2)
    for name, saved in (("full", prm), ("lora", lora)):
        saved.save_pretrained(tmp_path / name)
        loaded = ProcessRewardModel.from_pretrained(tmp_path / name)
        assert loaded.score(None, "Q", "Step 1: a") == saved.score(None, "Q", "Step 1: a")


def test_loading_draws_no_random_number():
    """The head is the first thing drawn after the seed, whatever is checked before."""
    torch.manual_seed(7)
    expected = random_head("linear", 32).weight
    torch.manual_seed(7)
    assert torch.equal(ProcessRewardModel.from_backbone(tiny_backbone()).score_head.weight, expected)


# ---------------------------------------------------------------- what never runs


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False], ids=["known class", "own class"])
def test_code_of_a_folder_never_runs_and_is_never_asked_about(folder, monkeypatch, file, known):
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    kinds = {"config.json": ("AutoConfig", "AutoModel"), "preprocessor_config.json": ("AutoImageProcessor",)}
    auto_map = {kind: "evil.Evil" for kind in kinds.get(file, ("AutoTokenizer",))}
    changes = {"auto_map": ["evil.Evil", "evil.Evil"] if file == "tokenizer_config.json" else auto_map}
    if not known:
        name = {"config.json": "model_type", "preprocessor_config.json": "image_processor_type"}.get(file)
        changes[name or "tokenizer_class"] = "Evil"
    edit(folder / file, **changes)
    if known:  # transformers' own class is used
        ProcessRewardModel.from_backbone(folder)
    elif file == "tokenizer_config.json":
        pass_or_refuse(folder)
    else:
        with pytest.raises(UserError, match="auto_map.*never run here"):
            ProcessRewardModel.from_backbone(folder)
    assert not (folder / "ran").exists()


def pass_or_refuse(folder: Path) -> None:
    """Load a backbone, or fail with the known error."""
    try:
        ProcessRewardModel.from_backbone(folder)
    except UserError as error:
        assert "\n" not in str(error)


def test_internvl_in_its_own_classes_names_the_other_checkpoint(folder, no_weights):
    auto_map = {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
    edit(folder / "config.json", model_type="internvl_chat", auto_map=auto_map)
    with pytest.raises(UserError, match="internvl_chat models are not supported .* whose name ends in -hf"):
        ProcessRewardModel.from_backbone(folder)


@pytest.mark.parametrize(
    "shard",
    ["pytorch_model.bin", "../other/model.safetensors", "/model.safetensors", 1, None, "a.safetensors/../b.bin"],
)
def test_an_index_that_names_no_safetensors_file_is_refused(folder, no_weights, shard):
    """A pickle would run whatever code it holds."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": {"visual.merger.ln_q.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is no safetensors file"):
        ProcessRewardModel.from_backbone(folder)


@pytest.mark.parametrize("content", ["[]", "1", "null", "{}", '{"weight_map": []}', '{"weight_map": null}', "{"])
def test_a_damaged_index_is_named(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="model.safetensors.index.json is damaged"):
        weight_files(str(folder))


def test_shards_are_found_and_a_missing_one_is_named(folder):
    AutoModel.from_pretrained(tiny_backbone()).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    files = weight_files(str(folder))
    assert len(files) > 1 and all(file.suffix == ".safetensors" for file in files)
    ProcessRewardModel.from_backbone(folder)
    files[0].unlink()
    with pytest.raises(UserError, match=f"{files[0].name} is missing, although .*index.json names it"):
        ProcessRewardModel.from_backbone(folder)


# ---------------------------------------------------------------- what is refused before weights are read


@pytest.mark.parametrize("model_type", ["bert", "", None, 1, ["qwen2_vl"], "x" * 10**6])
def test_other_kinds_of_models_are_refused_before_their_weights_are_read(folder, no_weights, model_type):
    edit(folder / "config.json", model_type=model_type)
    with pytest.raises(UserError, match=r"models are not supported \(supported: qwen2_vl") as caught:
        ProcessRewardModel.from_backbone(folder)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", ["[]", "1", "null", '"x"', "{", "{}", "[" * 5000])
def test_a_config_that_describes_no_model(folder, no_weights, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        ProcessRewardModel.from_backbone(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "num_hidden_layers", 10**9), ("vision_config", "depth", 10**9), (None, "num_labels", 10**9),
        ("text_config", "num_hidden_layers", float("inf")), ("text_config", "hidden_size", 10**9),
        ("text_config", "intermediate_size", 10**12), ("vision_config", "embed_dim", 2**40),
    ],
)  # fmt: skip
def test_sizes_that_fit_no_memory_are_refused_at_once(folder, part, name, value):
    values = json.loads((folder / "config.json").read_text())
    (values[part] if part else values)[name] = value
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="config.json") as caught:
        ProcessRewardModel.from_backbone(folder)
    assert "\n" not in str(caught.value)


def test_weights_of_its_own_name_are_refused(folder, no_weights):
    edit(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(UserError, match="transformers_weights.*delete that entry"):
        ProcessRewardModel.from_backbone(folder)


def test_a_folder_without_a_tokenizer_says_so(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="holds no tokenizer: copy tokenizer.json"):
        ProcessRewardModel.from_backbone(folder)


def test_truncated_weights_are_named(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        ProcessRewardModel.from_backbone(folder)


# ---------------------------------------------------------------- tokenizer and embedding


@pytest.mark.parametrize("special", [False, True])
def test_an_added_token_without_a_resized_embedding_is_refused_at_the_start(folder, special):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<mark>", special=special)])
    tokenizer.save_pretrained(folder)
    if special:  # text cannot hold it, and the template does not
        assert ProcessRewardModel.from_backbone(folder).score(None, "<mark>", "Step 1: <mark>")
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text("<mark>" + template)
    with pytest.raises(UserError, match="'<mark>' with the number 273, and the model embeds 273 tokens.*resize_token"):
        ProcessRewardModel.from_backbone(folder)


def test_an_embedding_that_was_resized_alone_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    tensors[name] = torch.cat([tensors[name], tensors[name][:7]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"hold 280 token embeddings, and config.json says 273 \(vocab_size\)"):
        ProcessRewardModel.from_backbone(folder)
    edit(folder / "config.json", vocab_size=280)
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["vocab_size"] = 280
    (folder / "config.json").write_text(json.dumps(values))
    ProcessRewardModel.from_backbone(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "the tokenizer's chat template fails"),
        ("{{ raise_exception('no images here') }}", "chat template fails: no images here"),
        ("{{ 'x' + messages[0]['content'] }}", "chat template fails"),
        ("{{ messages[0].content | nofilter }}", "chat template fails"),
        ("{{ 1 / 0 }}", "chat template fails"),
        ("x" * 10**6, "must place each image and text of a question once"),
        ([{"name": "rag", "template": "x"}], "chat template fails|cannot be loaded"),
        (7, "chat template"),
    ],
    ids=str,
)
def test_a_chat_template_that_fails_is_one_short_line(folder, template, message):
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template)
    else:
        (folder / "chat_template.jinja").unlink()
        edit(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(UserError, match=message) as caught:
        ProcessRewardModel.from_backbone(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
