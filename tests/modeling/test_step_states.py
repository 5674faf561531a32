"""step_states.py: the states that are remembered give the scores of the whole pass, whatever batch asks first."""

import json
from dataclasses import replace

import pytest
import torch

from reweighting.data.chains import Chain
from reweighting.main import main
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.modeling.step_states import StepStates
from tests.runs import flags, same_results, weights
from tests.tiny import build, draw_cells, tiny_backbone
from tests.tiny_families import TEXT_FAMILIES, TINY_FAMILIES, tiny_family

STEPS = ("Step 1: two in the first row", "Step 2: so 3 in all", "Step 3: that is 3")


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """Chains of one to three steps to two questions, one of them with an image."""
    image = draw_cells(tmp_path_factory.mktemp("images") / "cells.png")
    with_image = [Chain("How many red cells?", STEPS[:n], (image,), targets=(0.9, 0.1, 0.5)[:n]) for n in (2, 1, 3)]
    return [*with_image, Chain("And how many words?", STEPS[:1], targets=(0.7,))]


def head_model(**settings) -> ProcessRewardModel:
    torch.manual_seed(0)
    model = ProcessRewardModel.from_backbone(settings.pop("folder", tiny_backbone()), train="head", **settings)
    torch.nn.init.normal_(model.score_head.weight)
    return model


def remembering(precision: str = "fp32", cache_bytes: int = 2**20, **settings) -> ProcessRewardModel:
    model = head_model(**settings)
    model.step_states = StepStates(model.base, model.chain_tokenizer, precision, cache_bytes)
    return model


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_scores_are_those_of_the_whole_pass(chains, family):
    if family in TEXT_FAMILIES:
        chains = [replace(chain, images=()) for chain in chains]
    plain, model = head_model(folder=tiny_family(family)).eval(), remembering(folder=tiny_family(family))
    expected = plain.collate([plain.chain_tokenizer.encode(chain) for chain in chains])
    for _ in range(2):  # computed, then remembered
        batch = model.make_batch(chains)
        assert batch.tokens is None and batch.states.shape == (4, 3, plain.score_head.weight.shape[1])
        for name in ("step_mask", "targets", "target_mask"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))
        assert batch.chains == expected.chains and batch.num_labeled_steps == expected.num_labeled_steps
        torch.testing.assert_close(model(batch), plain(expected), rtol=0, atol=1e-5)
        torch.testing.assert_close(model.chain_logits(chains)[0], plain.chain_logits(chains)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_depend_on_no_batch_and_on_no_room(chains, precision):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    one, other = (remembering(precision, room, dtype=dtype) for room in (2**20, 0))
    together = one.make_batch(chains)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), torch.inference_mode():  # as validation
        for chain in chains[::-1]:
            other.make_batch([chain])
    for row, chain in enumerate(chains):
        assert torch.equal(other.make_batch([chain]).states[0], together.states[row, : len(chain.steps)])
    assert not other.step_states._known and together.states.dtype == dtype


def test_a_chain_is_read_once(chains, monkeypatch):
    model, read = remembering(), []
    compute = model.step_states.compute
    monkeypatch.setattr(model.step_states, "compute", lambda chain: read.append(chain) or compute(chain))
    again = [replace(chain, targets=(), label=1.0, domain=-1) for chain in chains]  # as meta chains
    for asked in (chains, again, chains[:1]):
        model.make_batch(asked)
        model.chain_logits(asked)
    assert read == chains


def test_memory_is_limited(chains):
    model = remembering(cache_bytes=4 * 4 * 32)  # four states of width 32
    model.make_batch(chains)  # of 2, 1, 3 and 1 steps
    assert [len(states) for states in model.step_states._known.values()] == [2, 1, 1]


def test_what_validation_computes_first_can_be_trained_with(chains):
    model = remembering()
    model.chain_logits(chains)
    model(model.make_batch(chains)).sum().backward()
    assert model.score_head.weight.grad.abs().sum() > 0 and model.training


def test_dropout_is_off(chains, tmp_path):
    config = json.loads((build(tmp_path) / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    first, second = (remembering(folder=tmp_path).make_batch(chains).states for _ in range(2))
    assert torch.equal(first, second)


def test_a_run_reads_each_chain_once(demo, tmp_path, monkeypatch):
    """Of training, meta and validation rows, over several epochs; the results are those of a run without memory."""
    read, compute = [], StepStates.compute
    monkeypatch.setattr(StepStates, "compute", lambda self, chain: read.append(chain) or compute(self, chain))
    more = ("--reward_model", str(tiny_backbone()), "--train", "head", "--iteration_num", "40", "--batch_size", "8")
    more += ("--validation_json_file", str(demo / "test.json"))
    main(flags(demo, tmp_path / "remembered", *more))
    keys = [(chain.prompt, chain.steps) for chain in read]
    assert len(keys) == len(set(keys)) and 60 < len(keys) <= 40 + 20 + 24
    monkeypatch.setattr("reweighting.training.build.CACHE_BYTES", 0)
    count = len(read)
    main(flags(demo, tmp_path / "again", *more))
    assert len(read) > 3 * count
    same_results(tmp_path / "remembered", tmp_path / "again")
    assert len(set(weights(tmp_path / "again").values())) > 1
