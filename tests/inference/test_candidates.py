"""candidates.py: scores depend on the candidate alone; votes and outcomes by hand."""

import pytest
import torch

from reweighting.data.load_rows import load_candidate_rows
from reweighting.inference.best_of_n_metrics import choice_outcomes
from reweighting.inference.candidates import score_candidates
from reweighting.modeling.reward_model import ProcessRewardModel


@pytest.fixture(scope="module")
def model(weights_path):
    return ProcessRewardModel.from_pretrained(weights_path / "prm")


@pytest.fixture(scope="module")
def rows(demo):
    """Six questions with four candidates each: one question has no image, one a far longer candidate."""
    rows = load_candidate_rows(demo / "test.json")
    long = ["Step 1: " + "on and on " * 12 + "\nStep 2: so 4", *rows[2].candidates[1:]]
    rows[1] = rows[1].model_copy(update={"image": None})
    rows[2] = rows[2].model_copy(update={"candidates": long})
    return rows


def test_scores_depend_on_no_batch_padding_order_or_neighbour(model, rows):
    reference = score_candidates(model, rows, batch_size=1)
    assert max(z[mask].std() for z, mask in reference) > 0.1  # they do differ
    for batch_size in (2, 3, 64):
        for (z, mask), (other, other_mask) in zip(reference, score_candidates(model, rows, batch_size), strict=True):
            assert torch.equal(mask, other_mask) and (z - other).abs().max() <= 1e-5
    backwards = [row.model_copy(update={"candidates": row.candidates[::-1]}) for row in rows[::-1]]
    for (z, mask), (other, other_mask) in zip(reference, score_candidates(model, backwards, 5)[::-1], strict=True):
        assert torch.equal(mask, other_mask.flip(0)) and (z - other.flip(0)).abs().max() <= 1e-5


def test_each_image_is_encoded_once_and_equal_candidates_are_scored_once(model, rows, monkeypatch):
    encoded, scored = [], []
    visual, head = model.backbone.visual, model.score_head
    visits = visual.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    count = head.register_forward_pre_hook(lambda _, args: scored.append(len(args[0])))
    same = [row.model_copy(update={"candidates": row.candidates + row.candidates[:2]}) for row in rows]
    both = score_candidates(model, same, batch_size=3)
    visits.remove()
    count.remove()
    images = [image for row in rows for image in model.chain_tokenizer.read_images(row.image_files)]
    assert sum(encoded) == sum(len(image.inputs["pixel_values"]) for image in images)
    assert sum(scored) == sum(len(set(row.candidates)) for row in rows)
    for z, _ in both:
        assert torch.equal(z[:2], z[4:])


def test_a_model_that_gives_no_finite_scores_is_a_user_error(weights_path, rows):
    model = ProcessRewardModel.from_pretrained(weights_path / "prm")
    torch.nn.init.constant_(model.score_head.bias, float("nan"))
    with pytest.raises(Exception, match="scores that are not finite"):
        score_candidates(model, rows[:1])


def test_outcomes_by_hand():
    # Aggregates (mean logit) 2, -1, 0.5, 0.4, -3; min -1, -1, 0.5, 0.4, -3.
    z = torch.tensor([[5.0, -1.0], [-1.0, 0.0], [0.5, 0.5], [0.4, 0.0], [-3.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, False], [True, False]])
    correct = [False, True, True, False, False]
    answers = ["7", "4", "4", "9", "9"]
    found = choice_outcomes(z, mask, correct, answers, 5)
    assert found["pass@1"] == pytest.approx(2 / 5) and found["pass@N"] == 1
    assert found["majority vote"] == pytest.approx(1 / 2)  # 4 and 9 have two votes each
    assert found["weighted majority"] == 1  # 4: 0.27 + 0.62, 7: 0.88, 9: 0.60 + 0.05
    assert found["best of N, mean_logit"] == 0 and found["best of N, min"] == 1
    first = choice_outcomes(z, mask, correct, answers, 1)
    assert set(first.values()) == {0.0}
    silent = choice_outcomes(z, mask, correct, [None] * 5, 5)
    assert silent["majority vote"] == silent["weighted majority"] == pytest.approx(2 / 5)
