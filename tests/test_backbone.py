"""The embedded backbone: small, loadable like any other, and one pass over a chain equals one pass per prefix."""

import json

import torch
from demo_world.pictures import KINDS

from reweighting.config.training import EMBEDDED_BACKBONE
from reweighting.data.chains import Chain, candidate_chains
from reweighting.data.load_rows import load_candidate_rows
from reweighting.inference.candidates import best_of_n_accuracy, choose, score_candidates
from reweighting.modeling.collate import collate
from reweighting.modeling.reward_model import ProcessRewardModel


def model() -> ProcessRewardModel:
    torch.manual_seed(0)
    made = ProcessRewardModel.from_backbone(EMBEDDED_BACKBONE).eval()
    torch.nn.init.normal_(made.score_head.weight, std=0.3)
    return made


def test_size_and_layout():
    names = {path.name for path in EMBEDDED_BACKBONE.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
    made = model()
    assert type(made.backbone).__name__ == "Qwen2VLModel"
    assert sum(p.numel() for p in made.backbone.parameters()) <= 3_000_000
    assert sum(path.stat().st_size for path in EMBEDDED_BACKBONE.iterdir() if path.is_file()) <= 10_000_000


def test_what_pretraining_reached_is_on_record():
    accuracy = json.loads((EMBEDDED_BACKBONE / "pretraining.json").read_text())["accuracy"]
    assert set(accuracy["kinds"]) == set(KINDS)
    assert min(scores["reading"] for scores in accuracy["kinds"].values()) > 0.9
    assert all(accuracy["skills"][skill] > 0.8 for skill in ("evidence", "rule", "sum", "conclusion"))


def test_one_pass_equals_one_pass_per_prefix_also_padded_in_a_batch(demo):
    made = model()
    rows = load_candidate_rows(demo / "test.json")
    chains = [candidate_chains(row)[0] for row in rows]
    longer = Chain(chains[0].question, (*chains[0].steps, "Step 6: " + "and so on " * 40), chains[0].images)
    batch = [*chains[:3], longer]
    with torch.no_grad():
        together = made(collate([made.chain_tokenizer.encode(chain) for chain in batch]))
        for row, chain in enumerate(batch):
            for step in range(len(chain.steps)):
                prefix = Chain(chain.question, chain.steps[: step + 1], chain.images)
                alone = made(collate([made.chain_tokenizer.encode(prefix)]))[0, -1]
                assert abs(alone - together[row, step]) <= 1e-5


def test_best_of_n_does_not_depend_on_batches_or_order(demo):
    made, rows = model(), load_candidate_rows(demo / "test.json")
    scored = score_candidates(made, rows, batch_size=32)
    for (a, mask), (b, _) in zip(scored, score_candidates(made, rows, batch_size=3), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert mask.shape == (4, 5) and mask.all()
    backwards = [row.model_copy(update={"candidates": row.candidates[::-1]}) for row in rows]
    chosen = choose(scored, 4)
    assert choose(score_candidates(made, backwards), 4) == [3 - c for c in chosen]
    right = [row.true_false for row in rows]
    expected = sum(row.true_false[c] for row, c in zip(rows, chosen, strict=True)) / len(rows)
    assert abs(best_of_n_accuracy(scored, right, 4) - expected) < 1e-6
    assert choose(scored, 1) == [0] * len(rows)
