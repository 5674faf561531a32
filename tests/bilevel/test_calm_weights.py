"""The calm rule: against its formula written out, in worlds without effects, over time, within bounds, and resumed."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from reweighting.bilevel import calm_weights
from reweighting.bilevel.calm_weights import CalmWeights
from reweighting.bilevel.domain_weights import DomainWeights, bound_weights
from reweighting.bilevel.evidence import SlopeEvidence
from reweighting.main import main
from reweighting.training.signals import Stopped
from tests.runs import StopAtStep, flags, history, same_results, weights
from tests.tiny import tiny_backbone

EFFECT = np.array([2.0, 1.0, 0.0, 0.0, -1.0, -2.0])  # on the meta loss


def calm(made: np.ndarray, windows_per_pass: float = 8.0) -> tuple[DomainWeights, CalmWeights]:
    """The rule after a series of hypergradients [n, K]."""
    table = DomainWeights([f"domain {i}" for i in range(made.shape[1])])
    evidence = SlopeEvidence(made.shape[1], windows_per_pass)
    rule = CalmWeights(table, evidence, 3.0)
    for one in made:
        evidence.add(torch.tensor(one))
        rule.step()
    return table, rule


def test_the_rule_is_its_formula():
    made = EFFECT + np.random.default_rng(0).normal(size=(20, 6))
    table, rule = calm(made)
    x = made.mean(1, keepdims=True) - made
    x /= np.sqrt((x**2).mean(1, keepdims=True))
    noise = rule.evidence.slopes().standard_error.square().sum().item()
    trust = 1 - noise / (x.mean(0) ** 2).sum()
    alpha = 3 * trust * x.mean(0) / np.sqrt((x**2).mean(0))
    assert 0.3 < trust < 1
    np.testing.assert_allclose(table.alpha.detach(), alpha, rtol=1e-5)
    for (low, high), weight in zip(rule.weight_intervals(), table().tolist(), strict=True):
        assert 0 < low <= weight * (1 + 1e-6) and weight * (1 - 1e-6) <= high
    assert rule.weight_intervals()[0][1] < 1 < rule.weight_intervals()[-1][0]


def test_alike_domains_keep_their_weights():
    rng = np.random.default_rng(1)
    spread = [calm(rng.normal(size=(30, 10)))[0]().std().item() for _ in range(50)]
    assert np.median(spread) == 0 and np.quantile(spread, 0.9) < 0.15


def test_weights_settle():
    """Four times the windows move the weights by little; AdamW would have moved on."""
    made = EFFECT + np.random.default_rng(2).normal(size=(120, 6))
    short, long = (calm(part)[0]().detach() for part in (made[:30], made))
    assert (long - short).abs().max() < 0.3 and short.max() > 1.5 and short.min() < 0.5


@pytest.mark.parametrize(("windows_per_pass", "scale"), [(8.0, 0.0), (1 / 64, 1e-9)])
def test_a_meta_loss_that_tells_nothing_leaves_every_weight_1(windows_per_pass, scale):
    """Hypergradients of 0; those of one answer, repeated: rounding."""
    table, _ = calm(scale * (EFFECT + np.random.default_rng(3).normal(size=(30, 6))), windows_per_pass)
    assert (table() == 1).all()


@pytest.mark.parametrize("count", [10, 14, 30, 41])
def test_raw_numbers_of_0_give_weights_of_exactly_1(count):
    assert set(DomainWeights([str(number) for number in range(count)])().tolist()) == {1.0}


def test_bounds_hold_and_the_mean_stays_1():
    for made in torch.rand(50, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64).pow(4).unbind():
        bounded = bound_weights(made / made.mean(), 0.3, 1.8)
        assert bounded.mean().item() == pytest.approx(1) and bounded.min() >= 0.3 and bounded.max() <= 1.8
        assert (bounded[made.argsort()].diff() >= 0).all()
    assert bound_weights(torch.tensor([0.0, 0.0, 3.0]), 0.0, 3.0).tolist() == pytest.approx([0, 0, 3])
    table = DomainWeights(["a", "b", "c"])
    table.alpha.data = torch.tensor([-20.0, 0.5, 4.0])
    before = table.alpha.detach().clone()
    table.bound_(0.0, math.inf)
    assert torch.equal(table.alpha, before)
    scale = softplus(before).mean()
    table.bound_(0.2, 1.9)
    assert table().tolist() == pytest.approx([0.2, 0.9, 1.9], abs=1e-5)
    assert softplus(table.alpha).mean().item() == pytest.approx(scale.item())


@pytest.fixture
def run(demo, monkeypatch):
    """Flags of a run of 6 windows with the tiny backbone, in which chance moves the weights too."""
    told = lambda evidence: float(evidence.slopes().standard_error.isfinite().all())  # noqa: E731
    monkeypatch.setattr(calm_weights, "trust", told)
    sizes = ("--iteration_num", "12", "--unroll_steps", "2", "--meta_batch_size", "4", "--meta_optimizer", "calm")
    return lambda output, *more: flags(demo, output, "--reward_model", str(tiny_backbone()), *sizes, *more)


def test_a_resumed_run_equals_one_that_was_never_cut(run, tmp_path, monkeypatch):
    main(run(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("reweighting.main.StopSignals", lambda: StopAtStep(9))
        with pytest.raises(Stopped):
            main(run(tmp_path / "cut"))
    main(run(tmp_path / "cut", "--resume"))
    same_results(tmp_path / "whole", tmp_path / "cut")
    assert max(weights(tmp_path / "whole").values()) > 1.1
    assert set(history(tmp_path / "whole")[2]["weights"].values()) == {1.0}  # three windows are too few
    saved = json.loads((tmp_path / "whole" / "domain_weights.json").read_text())["evidence"]["domains"]
    for domain, weight in weights(tmp_path / "whole").items():
        low, high = saved[domain]["weight_interval"]
        assert low <= weight * (1 + 1e-6) and weight * (1 - 1e-6) <= high


def test_a_run_keeps_to_its_bounds(run, tmp_path):
    main(run(tmp_path, "--min_weight", "0.8", "--max_weight", "1.3"))
    values = weights(tmp_path).values()
    assert min(values) == pytest.approx(0.8, abs=1e-5) and max(values) <= 1.3 + 1e-5
    saved = json.loads((tmp_path / "domain_weights.json").read_text())["evidence"]["domains"].values()
    assert all(0.8 <= low <= high <= 1.3 for low, high in (one["weight_interval"] for one in saved))


def test_one_meta_answer_repeated_moves_nothing(run, demo, tmp_path, capsys):
    """Half of its copies are called correct: the meta loss is 0.25 whatever the model says."""
    row = json.loads((demo / "meta.json").read_text())[0] | {"image_path": None}
    rows = [row | {"id": f"copy {i}", "true_false": i % 2 == 0} for i in range(16)]
    (tmp_path / "meta.json").write_text(json.dumps(rows))
    main(run(tmp_path / "run", "--meta_json_file", str(tmp_path / "meta.json")))
    assert set(weights(tmp_path / "run").values()) == {1.0}
    out, err = capsys.readouterr()
    assert "warning: --meta_batch_size 4 reads every different meta answer for each update" in err
    assert "Nothing can be told of a single domain: each update read the whole meta set" in out


def test_where_nothing_can_be_told_a_run_is_that_with_equal_weights(run, demo, tmp_path):
    """Bit for bit, with 14 domains too, whose weights a float32 mean would make 0.99999994."""
    rows = json.loads((demo / "train.json").read_text())
    spread = [row | {"dataset": str(number % 14)} for number, row in enumerate(rows)]
    (tmp_path / "train.json").write_text(json.dumps(spread))
    files = ("--train_json_file", str(tmp_path / "train.json"), "--image_root", str(demo))
    same = (*files, "--gradient_accumulation", "7", "--iteration_num", "6", "--unroll_steps", "2")
    main(run(tmp_path / "learned", *same))
    main(flags(demo, tmp_path / "equal", "--reward_model", str(tiny_backbone()), *same, "--baseline"))
    assert set(weights(tmp_path / "learned").values()) == {1.0}
    saved = [tmp_path / name / "prm" / "model.safetensors" for name in ("learned", "equal")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
