"""Warm-up: its steps are plain fine-tuning's to the bit, nothing of the upper level happens in it, and it resumes."""

import pytest

from reweighting.data.samplers import QuestionSampler
from reweighting.errors import UserError
from reweighting.main import main
from reweighting.training.checkpoints import load_checkpoint
from reweighting.training.dry_run import same
from tests.runs import flags, history, same_results, weights, without_times
from tests.tiny import tiny_backbone
from tests.training.test_resume import cut_and_resume

WARM = ("--warmup_iterations", "5", "--iteration_num", "15")


@pytest.fixture
def tiny(demo):
    """flags(), with the tiny backbone."""
    return lambda output, *more: flags(demo, output, "--reward_model", str(tiny_backbone()), *more)


def test_warm_up_is_plain_fine_tuning_to_the_bit(tiny, tmp_path):
    main(tiny(tmp_path / "plain", "--baseline", "--iteration_num", "15", "--keep_checkpoints", "9"))
    main(tiny(tmp_path / "warm", *WARM, "--keep_checkpoints", "9"))
    first, second, third = without_times(tmp_path / "warm")
    assert first == without_times(tmp_path / "plain")[0] and "meta_loss" not in first
    place = "checkpoints/step-00000005"
    states = [load_checkpoint(tmp_path / name / place)["problems"] for name in ("plain", "warm")]
    assert same(states[0]["lower"], states[1]["lower"] | {"window": {}})
    assert states[1]["upper"]["count"] == 0 and states[1]["lower"]["window"]["steps"] == []
    # Then the weights are learned: two updates, the first after a whole window.
    assert second["meta_loss"] is not None and second["weights"] != first["weights"] != third["weights"]
    end = load_checkpoint(tmp_path / "warm" / "checkpoints/step-00000015")
    assert end["problems"]["upper"]["count"] == 2 and weights(tmp_path / "warm") == third["weights"]


# In the warm-up, at its end, in the first window.
@pytest.mark.parametrize(("cut", "hypergradient"), [(3, "unrolled"), (5, "unrolled"), (7, "unrolled"), (7, "jvp")])
def test_a_run_with_warm_up_resumes(tiny, tmp_path, monkeypatch, cut, hypergradient):
    more = (*WARM, "--hypergradient", hypergradient)
    main(tiny(tmp_path / "whole", *more))
    cut_and_resume(monkeypatch, tiny(tmp_path / "cut", *more), cut)
    same_results(tmp_path / "whole", tmp_path / "cut")


def test_no_meta_answer_is_read_in_warm_up(tiny, tmp_path, monkeypatch):
    drawn = []
    original = QuestionSampler.draw
    monkeypatch.setattr(QuestionSampler, "draw", lambda self, number: drawn.append(number) or original(self, number))
    main(tiny(tmp_path, *WARM))
    assert drawn == [0, 1] and [line["step"] for line in history(tmp_path)] == [5, 10, 15]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--warmup_iterations", "7"), "--warmup_iterations 7 is no multiple of --unroll_steps 5, .* use 5 or 10"),
        (("--warmup_iterations", "10"), "--warmup_iterations 10 leaves none of --iteration_num 10 .* at most 5"),
        (("--warmup_iterations", "-5"), "--warmup_iterations: found -5"),
        (("--warmup_iterations", "5", "--baseline"), "--warmup_iterations does nothing with --baseline"),
    ],
)
def test_warm_ups_that_make_no_sense(tiny, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        main(tiny(tmp_path, *more))
