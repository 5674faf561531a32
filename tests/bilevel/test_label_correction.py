"""Labels that the upper level corrects: their bounds, how they move, and the command with them."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn
from torch.func import functional_call

from reweighting.bilevel import instance_evidence
from reweighting.bilevel.hypergradients.derivatives import forward_mode
from reweighting.bilevel.hypergradients.directional import DirectionalHypergradient
from reweighting.bilevel.label_correction import LabelCorrection, LabelSlopes, StepLabels, wilson_interval
from reweighting.bilevel.losses import STEP_LOSSES, label_costs, loss_parts, mean_loss
from reweighting.data.chains import Chain
from reweighting.distributed.flat_vectors import flatten
from reweighting.errors import UserError
from reweighting.main import main
from reweighting.modeling.collate import collate_states
from reweighting.training.labels import save_corrected_labels
from reweighting.training.signals import Stopped
from tests.runs import StopAtStep, flags, same_results
from tests.tiny import tiny_backbone

NAN = math.nan


@pytest.mark.parametrize(("score", "times"), [(0, 4), (1, 4), (4, 4), (7, 16), (0, 1), (1, 1), (500, 1000)])
def test_the_interval_is_wilsons(score, times):
    low, high = wilson_interval(torch.tensor([score / times]).double(), torch.tensor([times]).double())
    expected = binomtest(score, times).proportion_ci(method="wilson")
    assert (low.item(), high.item()) == pytest.approx((expected.low, expected.high), abs=1e-12)


def chain(*targets: float, times: tuple[float, ...] = ()) -> Chain:
    return Chain("Q?", tuple("abcd"[: len(targets)]), targets=targets, times=times, domain=0, rows=(0,))


@pytest.mark.parametrize("times", [1e-300, 0.5, 1.0, 16.0, 1e15, 1e300])
def test_any_number_of_rollouts_bounds_a_label(times):
    labels = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    low, high = wilson_interval(labels, torch.tensor([times] * 3, dtype=torch.float64))
    assert (0 <= low).all() and (low <= labels).all() and (labels <= high).all() and (high <= 1).all()
    width = (high - low)[1].item()
    assert (width > 0.99) == (times == 1e-300) and (width < 1e-6) == (times > 1e14)


def test_labels_have_bounds_where_they_are_estimates():
    chains = [chain(0.25, NAN, 1, times=(4, NAN, 1)), chain(1, 0.5, times=(16, 16)), chain(0)]
    table = StepLabels(chains, "interval")
    assert table.labels.tolist() == [0.25, 0, 1, 1, 0.5, 0] and len(table.unknown) == 0 and table.movable == 3
    moves = (table.low < table.high).tolist()
    assert moves == [True, False, False, True, True, False]  # not: no label, and the last step of an answer
    published = StepLabels(chains, "published")
    assert (published.low < published.high).tolist() == moves
    assert published.low[0] == 0 and published.high[0] == 1
    assert StepLabels([chain(0.25, 0.5), chain(0.5, 0)], "interval").unknown.tolist() == [0, 1, 2]
    assert len(StepLabels([chain(0.25, 0.5), chain(0.5, 0)], "interval", default_times=8).unknown) == 0


@pytest.mark.parametrize(
    ("last_step", "label", "times", "moves"),
    [
        ("Final answer: 7", 1, 16, False),
        ("Final answer: 7", 0, 1, False),
        ("So it is 7.", 0, 1, False),  # a single verdict
        ("So it is 7.", 1, NAN, False),  # of people, or of the answer
        ("We add both.", 0, 16, True),  # the chain ends before its answer
        ("We add both.", 1, 2, True),
        ("Final answer: 7", 0.75, 16, True),
    ],
)
@pytest.mark.parametrize("bounds", ["interval", "published"])
def test_a_chain_that_ends_before_its_answer_has_an_estimate_there(last_step, label, times, moves, bounds):
    one = replace(chain(0.5, label, times=(16, times)), steps=("We see 3 and 4.", last_step))
    table = StepLabels([one], bounds)
    assert (table.low < table.high).tolist() == [True, moves] and table.movable == 1 + moves
    if moves and bounds == "interval":
        low, high = wilson_interval(torch.tensor([label]).double(), torch.tensor([times]).double())
        assert (table.low[1].item(), table.high[1].item()) == pytest.approx((low.item(), high.item()))


def test_the_number_of_all_rollouts_holds_for_the_last_label_too():
    cut, whole = chain(0.5, 0), replace(chain(0.5, 0), steps=("a", "The answer is 7."))
    table = StepLabels([cut, whole], "interval", default_times=8)
    assert (table.low < table.high).tolist() == [True, True, True, False]


def batch_of(chains, ids):
    states = [torch.zeros(len(chains[index].steps), 2) for index in ids]
    return replace(collate_states([chains[index] for index in ids], states), chain_ids=torch.tensor(ids))


def test_a_batch_gets_the_labels_of_its_steps():
    chains = [chain(0.25, NAN, 1, times=(4, NAN, 4)), chain(0.1, 0.7, times=(10, 10)), chain(0.3, times=(10,))]
    table, batch = StepLabels(chains, "interval"), batch_of(chains, [2, 0])
    assert torch.equal(table.corrected(batch).targets, batch.targets)
    assert table.places(batch).tolist() == [[5, -1, -1], [0, -1, 2]]
    table.labels.data += 0.01
    assert table.corrected(batch).targets.tolist() == [
        pytest.approx([0.31, 0, 0]), pytest.approx([0.26, 0, 1.01])
    ]  # fmt: skip


@pytest.mark.parametrize("loss", STEP_LOSSES)
def test_the_cost_of_a_label_has_the_slope_that_the_loss_gains(loss):
    """d^2 loss / dp dz, by autograd of both."""
    chains = [chain(0.25, 0.5, times=(4, 4)), chain(0.75, times=(4,))]
    batch, logits = batch_of(chains, [0, 1]), torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    targets = batch.targets.double().requires_grad_()
    total = mean_loss(STEP_LOSSES[loss](logits, replace(batch, targets=targets)), batch)
    by_logit = torch.autograd.grad(total, logits, create_graph=True)[0]
    exact = torch.autograd.grad(by_logit.sum(), targets)[0]
    found = torch.autograd.grad(label_costs(STEP_LOSSES[loss], logits, batch)[batch.target_mask].sum(), logits)[0]
    torch.testing.assert_close(found, exact)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 20)), min_size=3, max_size=6),
    st.sampled_from(["interval", "published"]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_labels_never_leave_their_interval(counts, bounds, calm, seed):
    chains = [chain(min(score, n) / n, 0.5, times=(n, n)) for score, n in counts]
    table = StepLabels(chains, bounds)
    optimizer = None if calm else torch.optim.AdamW(table.parameters(), lr=0.5, weight_decay=0, eps=1e-15)
    correction = LabelCorrection(table, optimizer)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(8):
        gradient = torch.randn(len(table), generator=generator) ** 3
        correction.add(LabelSlopes(gradient, torch.ones(len(table), dtype=torch.int64)))
        correction.step()
        assert (table.labels >= table.low).all() and (table.labels <= table.high).all()


class Points:
    """Steps whose true label is known, each a chain of its own; a head on their states; a meta set of the truth."""

    COUNT, WRONG = 24, 8

    def __init__(self, loss: str):
        torch.manual_seed(1)
        self.true = torch.tensor([1.0, 0.0] * (self.COUNT // 2))
        targets = self.true * 0.5 + 0.25
        targets[: self.WRONG] = 1 - targets[: self.WRONG]  # three of four rollouts went wrong by chance
        self.chains = [chain(target, times=(4,)) for target in targets.tolist()]
        self.states = torch.eye(self.COUNT) + 0.1 * torch.randn(self.COUNT, self.COUNT)
        self.head, self.step_loss = nn.Linear(self.COUNT, 1), STEP_LOSSES[loss]
        batch = collate_states(self.chains, list(self.states[:, None]))
        self.batch = replace(batch, chain_ids=torch.arange(self.COUNT))

    def logits(self, params):
        return functional_call(self.head, params, (self.batch.states,)).squeeze(2)  # [B, 1]


@pytest.mark.parametrize("calm", [False, True])
@pytest.mark.parametrize("loss", STEP_LOSSES)
def test_labels_move_towards_the_truth_where_the_meta_set_knows_it(loss, calm):
    points = Points(loss)
    table, params = StepLabels(points.chains, "interval"), dict(points.head.named_parameters())
    correction = LabelCorrection(
        table, None if calm else torch.optim.AdamW(table.parameters(), lr=0.02, weight_decay=0)
    )

    def parts(at, batch):
        found = loss_parts(points.step_loss(points.logits(at), table.corrected(batch)), batch)
        return torch.cat([found[:, None], label_costs(points.step_loss, points.logits(at), batch)], 1)

    optimizer = torch.optim.SGD(params.values(), lr=2.0)
    hypergradient = DirectionalHypergradient(optimizer, params, parts, forward_mode, labels=table)
    for step in range(40):
        gradient = torch.autograd.grad(parts(params, points.batch)[:, 0].sum(), list(params.values()))
        hypergradient.add_micro_batch(step, 0, points.batch, gradient)
        for param, piece in zip(params.values(), gradient, strict=True):
            param.grad = piece
        optimizer.step()
        hypergradient.close_step(flatten(gradient), 1.0, 2.0)
        if step % 2:
            meta = (points.logits(params).squeeze(1).sigmoid() - points.true).square().mean()
            hypergradient.compute(flatten(torch.autograd.grad(meta, list(params.values()))), torch.ones(1))
            correction.add(hypergradient.label_slopes)
            correction.step()
    before, after = ((labels - points.true).abs() for labels in (table.start, table.labels.detach()))
    assert (after < before).float().mean() > (0.5 if calm else 0.95)
    assert after[: points.WRONG].mean() < before[: points.WRONG].mean() - 0.1


@pytest.fixture
def run(demo, monkeypatch):
    """Flags of a run of 6 windows with the tiny backbone, in which chance moves labels under the calm rule too."""
    monkeypatch.setattr(instance_evidence, "CHANCE", -2.0)
    sizes = ("--iteration_num", "12", "--unroll_steps", "2", "--meta_batch_size", "4")
    return lambda output, *more: flags(demo, output, "--reward_model", str(tiny_backbone()), *sizes, *more)


def saved(folder) -> list[dict]:
    return pyarrow.parquet.read_table(folder / "corrected_labels.parquet").to_pylist()


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("--weights_for", "domain", "--correct_labels", "interval"), marks=pytest.mark.slow),
        ("--weights_for", "both", "--correct_labels", "interval", "--meta_optimizer", "calm", "--lower_loss", "bce"),
        pytest.param(
            ("--weights_for", "instance", "--correct_labels", "published", "--label_lr", "0.1", "--optimizer", "sgd"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["interval", "calm", "published"],
)
def test_a_run_corrects_saves_and_resumes(run, demo, tmp_path, monkeypatch, more, capsys):
    main(run(tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        patch.setattr("reweighting.main.StopSignals", lambda: StopAtStep(9))  # inside a window
        with pytest.raises(Stopped):
            main(run(tmp_path / "cut", *more))
    main(run(tmp_path / "cut", *more, "--resume"))
    same_results(tmp_path / "whole", tmp_path / "cut")
    found = saved(tmp_path / "whole")
    assert found == saved(tmp_path / "cut")
    rows = json.loads((demo / "train.json").read_text())
    assert sorted(one["row"] for one in found) == list(range(200)) and {one["step"] for one in found} == set(range(5))
    for one in found:
        row = rows[one["row"]]
        assert (one["domain"], one["times"]) == (row["dataset"], row["times"])
        assert one["label"] == pytest.approx(row["accuracy"])
        assert one["low"] <= one["corrected_label"] <= one["high"]
        assert row["add"].count("Step ") == one["step"] + 1
    moved = [one for one in found if one["corrected_label"] != one["label"]]
    assert len(moved) > 50
    assert f"{len(moved)} of 200 have moved" in capsys.readouterr().out
    assert all(one["windows"] for one in moved) or "calm" not in more
    if "interval" in more:
        assert all(one["high"] - one["low"] < 0.5 for one in moved)
    with pytest.raises(UserError, match="corrects labels .* and this one learns the weights"):
        main(run(tmp_path / "cut", "--resume", *more[:2]))


@pytest.mark.parametrize("calm", [True, False])
def test_labels_that_the_calm_rule_leaves_are_explained(tmp_path, capsys, calm):
    chains = [chain(0.25, 0.5, times=(4, 4)), chain(0.5, 0.75, times=(4, 4))]
    table = StepLabels(chains, "interval")
    correction = LabelCorrection(table, None if calm else torch.optim.AdamW(table.parameters(), weight_decay=0))
    correction.add(LabelSlopes(torch.tensor([1.0, -1, 1, -1]), torch.ones(4, dtype=torch.int64)))
    correction.step()
    save_corrected_labels(tmp_path, SimpleNamespace(train=chains, domains=["a"]), correction)
    told = capsys.readouterr().out
    assert f"{0 if calm else 4} of 4 have moved" in told
    assert ("No label moves yet: chance may explain" in told) is calm


def test_labels_alone_are_corrected_with_equal_weights(run, demo, tmp_path):
    rows = [row | {"dataset": "all"} for row in json.loads((demo / "train.json").read_text())]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    one = ("--train_json_file", str(tmp_path / "train.json"), "--image_root", str(demo))
    main(run(tmp_path / "one", *one, "--correct_labels", "published"))
    equal = ("--min_weight", "1", "--max_weight", "1", "--correct_labels", "interval")
    main(run(tmp_path / "many", *equal))
    weights = json.loads((tmp_path / "many" / "domain_weights.json").read_text())["weights"]
    assert list(weights.values()) == pytest.approx([1] * 10)
    for folder in ("one", "many"):
        assert any(one["corrected_label"] != one["label"] for one in saved(tmp_path / folder))


def test_labels_without_rollouts(run, demo, tmp_path):
    rows = json.loads((demo / "train.json").read_text())
    for row in rows:
        del row["times"], row["score"]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    bare = ("--train_json_file", str(tmp_path / "train.json"), "--image_root", str(demo))
    with pytest.raises(UserError, match=r"\d+ of 200 labels do not say .* in .*train.json: rows 0, 1.*--label_times"):
        main(run(tmp_path / "none", *bare, "--correct_labels", "interval"))
    main(run(tmp_path / "given", *bare, "--correct_labels", "interval", "--label_times", "16"))
    main(run(tmp_path / "known", "--correct_labels", "interval"))
    columns = ("low", "high", "corrected_label")
    given, known = ([[one[name] for name in columns] for one in saved(tmp_path / f)] for f in ("given", "known"))
    assert given == known


def test_labels_of_which_none_can_move(run, demo, tmp_path):
    rows = json.loads((demo / "train.json").read_text())
    verdicts = [row | {"score": 1, "times": 1, "accuracy": 1.0} for row in rows if "Final answer" in row["add"]]
    (tmp_path / "train.json").write_text(json.dumps(verdicts))
    bare = ("--train_json_file", str(tmp_path / "train.json"), "--image_root", str(demo))
    for bounds in ("interval", "published"):
        with pytest.raises(UserError, match=f"--correct_labels {bounds}: none of the 40 labels can move"):
            main(run(tmp_path / "run", *bare, "--correct_labels", bounds))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--hypergradient", "unrolled"), "unrolled finds no slope of a single label, which --correct_labels interval"),
        (("--hypergradient", "darts"), "darts finds no slope of a single label"),
        (("--baseline",), "--correct_labels does nothing with --baseline"),
        (("--meta_optimizer", "calm", "--label_lr", "0.1"), "--label_lr does nothing without"),
        (("--correct_labels", "published", "--label_times", "4"), "--label_times does nothing without"),
        (("--label_lr", "2"), "--label_lr: found 2.0, allowed: a number of at most 1"),
    ],
)
def test_flags_that_contradict_each_other(demo, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        main(flags(demo, tmp_path, "--reward_model", str(tiny_backbone()), "--correct_labels", "interval", *more))


def test_a_state_of_other_labels_is_refused():
    def made(*targets):
        return LabelCorrection(StepLabels([chain(*targets, times=(4.0,) * len(targets))], "interval"), None)

    with pytest.raises(ValueError, match="it has 2 labels, and the data have 3"):
        made(0.25, 0.5, 0.75).load_state_dict(made(0.25, 0.5).state_dict())
