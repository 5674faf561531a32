"""score_head.py: the answers' logits as the generating model gives them, read from wherever they are."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2VLForConditionalGeneration

from reweighting.data.chains import Chain
from reweighting.errors import UserError
from reweighting.modeling.collate import collate
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.modeling.score_head import random_head
from tests.tiny import build, tiny_backbone
from tests.tiny_families import TEXT_FAMILIES, TINY_FAMILIES, tiny_family

CHAINS = [Chain("How many?", ("Step 1: look", "Step 2: so 3")), Chain("And how many others?", ("Step 1: two",))]


def generating(folder, tied: bool, **options) -> Qwen2VLForConditionalGeneration:
    """Write a model with an LM head into `folder`, as on the hub, and give it."""
    config = AutoConfig.from_pretrained(build(folder))
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    model = Qwen2VLForConditionalGeneration(config).eval()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, **options)
    return model


def of_generating(model, prm, batch) -> torch.Tensor:
    """The slow way: the logits [B, S] of the right answer minus those of the wrong one, by the model that generates."""
    answers = [prm.config.correct_token, prm.config.incorrect_token]
    right, wrong = (prm.chain_tokenizer.tokenizer.encode(text, add_special_tokens=False)[0] for text in answers)
    with torch.no_grad():
        logits = model(**prm.chain_tokenizer.family.model_inputs(batch.tokens)).logits
    rows = torch.arange(len(logits))[:, None]
    at_ends = logits[rows, batch.step_ends]
    return (at_ends[..., right] - at_ends[..., wrong]).masked_fill(~batch.step_mask, 0)


@pytest.mark.parametrize("score_head", ["token", "linear_from_token"])
@pytest.mark.parametrize(
    ("tied", "options"),
    [(False, {}), (True, {}), (False, {"max_shard_size": "20KB"})],
    ids=["untied", "tied", "shards"],
)
def test_the_score_is_the_logit_difference_of_the_generating_model(tmp_path, score_head, tied, options):
    model = generating(tmp_path, tied, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or options
    prm = ProcessRewardModel.from_backbone(
        tmp_path, score_head=score_head, correct_token="Step", incorrect_token="-"
    ).eval()
    batch = collate([prm.chain_tokenizer.encode(chain) for chain in CHAINS])
    z = prm(batch).detach()
    assert (z - of_generating(model, prm, batch)).abs().max() <= 1e-5
    assert z[batch.step_mask].std() > 0.1
    assert prm.score_head.weight.requires_grad == (score_head == "linear_from_token")
    assert (prm.config.correct_token, prm.config.incorrect_token) == ("Step", "-")


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_answers_as_its_generating_model(family):
    kind = AutoModelForCausalLM if family in TEXT_FAMILIES else AutoModelForImageTextToText
    model = kind.from_pretrained(tiny_family(family)).eval()
    prm = ProcessRewardModel.from_backbone(tiny_family(family), score_head="token").eval()
    batch = collate([prm.chain_tokenizer.encode(chain) for chain in CHAINS])
    z = prm(batch).detach()
    assert (z - of_generating(model, prm, batch)).abs().max() <= 1e-4 and z[batch.step_mask].std() > 0.01


def test_two_layers_are_their_formula_and_start_near_one_half():
    torch.manual_seed(0)
    head = random_head("mlp", 64)
    h, (w, c, v, b) = torch.randn(100, 64), head.parameters()
    inner = h @ w.T + c
    expected = 0.5 * inner * (1 + torch.erf(inner / 2**0.5)) @ v.T + b
    torch.testing.assert_close(head(h), expected, rtol=0, atol=1e-5)
    assert w.shape == (512, 64) and 0.01 < head(h).std() < 0.5


def test_a_low_precision_base_reads_its_answers_in_float32(tmp_path):
    generating(tmp_path, tied=True)
    heads = [
        ProcessRewardModel.from_backbone(tmp_path, train="lora", score_head="token", dtype=dtype).score_head.weight
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert heads[1].dtype == torch.float32 and torch.allclose(*heads, atol=1e-2)


def test_the_head_of_answers_stays_while_tied_embeddings_learn(tmp_path):
    """What is saved is the head as it was read, not the rows of an embedding that has moved since."""
    generating(tmp_path / "base", tied=True)
    prm = ProcessRewardModel.from_backbone(tmp_path / "base", score_head="token")
    start = prm.score_head.weight.clone()
    optimizer = torch.optim.SGD([p for p in prm.parameters() if p.requires_grad], lr=0.1)
    batch = collate([prm.chain_tokenizer.encode(chain) for chain in CHAINS])
    prm(batch).sum().backward()
    optimizer.step()
    assert torch.equal(prm.score_head.weight, start)
    prm.save_pretrained(tmp_path / "prm")
    loaded = ProcessRewardModel.from_pretrained(tmp_path / "prm")
    assert torch.equal(loaded.chain_logits(CHAINS)[0], prm.chain_logits(CHAINS)[0])
    assert not loaded.score_head.weight.requires_grad


def test_a_backbone_without_an_output_embedding():
    with pytest.raises(UserError, match="has no LM head .*use --score_head linear"):
        ProcessRewardModel.from_backbone(tiny_backbone(), score_head="token")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"correct_token": "Yes"}, "--correct_token 'Yes': 3 tokens for this tokenizer"),
        ({"incorrect_token": ""}, "--incorrect_token '': 0 tokens for this tokenizer"),
        ({"correct_token": "-"}, "are the same: '-'"),
    ],
)
def test_answers_that_are_not_one_token_each(tmp_path, tokens, message):
    generating(tmp_path, tied=True)
    with pytest.raises(UserError, match=message):
        ProcessRewardModel.from_backbone(tmp_path, score_head="token", **tokens)
