"""Weights of single chains: their arithmetic, what the windows tell of them, and the command with them."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch.nn.functional import softplus

from reweighting.bilevel import instance_evidence
from reweighting.bilevel.instance_evidence import InstanceEvidence
from reweighting.bilevel.instance_weights import FixedChainWeights, InstanceWeights, PublishedInstanceWeights
from reweighting.bilevel.losses import loss_parts, squared_error
from reweighting.bilevel.problems import PRMFineTuning
from reweighting.config.training import TrainingConfig
from reweighting.data.chains import Chain
from reweighting.devices import autocast
from reweighting.errors import UserError
from reweighting.main import main
from reweighting.training.build import make_meta_optimizer
from reweighting.training.fixed_weights import read_instance_weights
from reweighting.training.instance_results import chain_digest, instance_page
from reweighting.training.signals import Stopped
from tests.runs import StopAtStep, flags, history, same_results, weights
from tests.tiny import draw_cells, tiny_backbone

DOMAIN_OF = torch.tensor([0, 1, 0, 1, 1, 2])


def table(times_domain: bool) -> InstanceWeights:
    made = InstanceWeights(["a", "b", "c"], DOMAIN_OF, times_domain).double()
    made.beta.data = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -2.0], dtype=torch.float64)
    if made.domain_weights is not None:
        made.domain_weights.alpha.data = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64)
    return made


def test_the_chains_of_a_domain_have_its_weight_on_average():
    both = table(times_domain=True)
    torch.testing.assert_close(both.by_domain(), both.domain_weights())
    ratios = both().detach() / softplus(both.beta.detach())  # the same within a domain
    assert ratios[0] == pytest.approx(ratios[2].item()) and ratios[1] == pytest.approx(ratios[4].item())
    alone = table(times_domain=False)
    ratios = alone().detach() / softplus(alone.beta.detach())  # the same everywhere
    torch.testing.assert_close(ratios, ratios[:1].expand(6))
    assert alone.by_domain().mean().item() == pytest.approx(1)
    assert (InstanceWeights(["a", "b", "c"], DOMAIN_OF, True)() == 1).all()


def test_slopes_of_the_domains_are_those_of_scaling_their_chains():
    both = table(times_domain=True)
    slopes = -both().detach().sin() * torch.arange(6)  # d loss / d weight of each chain
    scales = torch.ones(3, dtype=torch.float64, requires_grad=True)
    scaled = ((scales[DOMAIN_OF] * both().detach()).cos() * torch.arange(6)).sum()
    by_scale = torch.autograd.grad(scaled, scales)[0]
    torch.testing.assert_close(both.slopes_by_domain(slopes).detach(), by_scale / both.by_domain().detach())


PUBLISHED = {
    "clip": lambda raw: min(max(raw, -1.0), 3.0),
    "relu": lambda raw: max(raw, 0.0),
    "leaky_relu": lambda raw: raw if raw > 0 else 0.01 * raw,
}


@pytest.mark.parametrize("activation", PUBLISHED)
def test_the_published_table_is_not_scaled(activation):
    made = PublishedInstanceWeights(DOMAIN_OF, activation)
    assert (made() == 1).all() and (made.by_domain() == 1).all()
    raw = [-2.5, -0.5, 0.5, 1.0, 2.5, 4.0]
    made.beta.data = torch.tensor(raw) - 1
    wanted = torch.tensor([PUBLISHED[activation](one) for one in raw])
    torch.testing.assert_close(made().detach(), wanted)
    torch.testing.assert_close(made.by_domain()[0].item(), (wanted[0] + wanted[2]).item() / 2)
    made().sum().backward()
    small = torch.tensor([PUBLISHED[activation](one + 1e-3) for one in raw])
    torch.testing.assert_close(made.beta.grad, (small - wanted) / 1e-3, atol=1e-2, rtol=0)
    assert made.slopes_by_domain(torch.arange(6.0)).tolist() == [2, 8, 5]  # finite where weights are 0 on average


def test_an_update_of_the_published_table_is_a_step_of_adamw():
    made, config = (
        PublishedInstanceWeights(DOMAIN_OF, "clip"),
        TrainingConfig.parse(
            ["--train_json_file", "a", "--meta_json_file", "b", "--weights_for", "instance"]
            + ["--meta_optimizer", "adamw", "--meta_lr", "0.005"]
        ),
    )
    optimizer = make_meta_optimizer(config.upper, made, None)
    made.beta.grad = torch.tensor([1e-9, -3.0, 0.0, 2e-4, -1e-7, 5.0])
    optimizer.step()
    torch.testing.assert_close(made().detach(), 1 - 0.005 * made.beta.grad.sign(), atol=1e-6, rtol=0)


def test_the_weighted_loss_is_not_rounded_in_bf16():
    logits, fixed = torch.randn(3, 4), FixedChainWeights(torch.rand(6) + 0.5, DOMAIN_OF)
    batch = SimpleNamespace(
        targets=torch.rand(3, 4),
        target_mask=torch.ones(3, 4, dtype=torch.bool),
        num_labeled_steps=12,
        chain_ids=torch.tensor([4, 1, 1]),
    )
    lower = SimpleNamespace(
        module=lambda _: logits, step_loss=squared_error, warming_up=False, weights=fixed, labels=None
    )
    lower.step_losses = partial(PRMFineTuning.step_losses, lower)
    with autocast(torch.device("cpu"), "bf16"):
        loss = PRMFineTuning.training_step(lower, (0, batch))
    parts = loss_parts(squared_error(logits, batch), batch)
    torch.testing.assert_close(loss, sum(fixed()[i] * part for i, part in zip((4, 1, 1), parts, strict=True)))


def made_windows(true: np.ndarray, windows: int, share: float, noise: float, seed: int) -> list[torch.Tensor]:
    """Hypergradients of windows that meet a share of the chains each; their scale grows, as over a training."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(windows):
        met = rng.random(len(true)) < share
        slopes = (true + noise * rng.normal(size=len(true)) + 5) * (1 + number)  # + 5: taken off within each group
        made.append(torch.tensor(np.where(met, -slopes, 0.0)))
    return made


def test_running_sums_equal_plain_ones():
    groups = np.arange(300) % 3
    windows = made_windows(np.random.default_rng(1).normal(size=300), 12, 0.4, 2.0, 2)
    evidence = InstanceEvidence(torch.tensor(groups))
    slopes = [[] for _ in range(300)]
    for window in windows:
        evidence.add(window, torch.ones(len(window)))
        window = -window.numpy()
        met = np.flatnonzero(window)
        x = np.array([window[i] - np.mean([window[j] for j in met if groups[j] == groups[i]]) for i in met])
        for i, one in zip(met, x / np.sqrt(np.mean(x**2)), strict=True):
            slopes[i].append(one)
    assert evidence.count.tolist() == [len(one) for one in slopes]
    seen = [one for one in slopes if one]
    count, mean = np.array([len(one) for one in seen]), np.array([np.mean(one) for one in seen])
    noise = sum(((np.array(one) - m) ** 2).sum() for one, m in zip(seen, mean, strict=True)) / (count - 1).sum()
    between = (count * mean**2).sum() / (len(seen) - 1)
    chance = 1 + 2 * np.sqrt(2 / (len(seen) - 1) + 2 / (count - 1).sum())
    variance = (between - chance * noise) / ((count.sum() - (count**2).sum() / count.sum()) / (len(seen) - 1))
    guesses = mean * count * variance / (count * variance + noise) / np.sqrt(variance)
    np.testing.assert_allclose(evidence.true_slopes()[evidence.count > 0], guesses, rtol=1e-9)


def test_true_slopes_are_found_and_chance_is_none():
    true = np.random.default_rng(3).normal(size=1000)
    for noise, correlation in ((1.0, 0.85), (3.0, 0.5)):
        evidence = InstanceEvidence(torch.zeros(1000, dtype=torch.int64))
        for window in made_windows(true, 20, 0.3, noise, 4):
            evidence.add(window, torch.ones(len(window)))
        guesses = evidence.true_slopes().numpy()
        assert np.corrcoef(guesses, true)[0, 1] > correlation
        assert guesses.std() < 1.1  # shrunk: no larger than the true ones, which have the standard deviation 1
    zero = 0
    for seed in range(30):
        evidence = InstanceEvidence(torch.zeros(1000, dtype=torch.int64))
        for window in made_windows(0 * true, 20, 0.3, 1.0, seed):
            evidence.add(window, torch.ones(len(window)))
        zero += not evidence.true_slopes().any()
    assert zero >= 27


def test_chains_that_were_met_once_tell_nothing():
    evidence = InstanceEvidence(torch.zeros(4, dtype=torch.int64))
    evidence.add(torch.tensor([1.0, -2.0, 0.0, 0.0]), torch.ones(4))
    evidence.add(torch.tensor([0.0, 0.0, 1.0, 3.0]), torch.ones(4))
    evidence.add(torch.zeros(4), torch.ones(4))
    assert not evidence.true_slopes().any() and evidence.count.tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="of the instances"):
        InstanceEvidence(torch.zeros(5, dtype=torch.int64)).load_state_dict(evidence.state_dict())


def test_a_chain_without_others_of_its_group_is_not_compared():
    evidence = InstanceEvidence(torch.tensor([0, 0, 1, 1]))
    evidence.add(torch.tensor([1.0, -2.0, 5.0, 0.0]), torch.ones(4))
    evidence.add(torch.tensor([1.0, 0.0, 5.0, 0.0]), torch.ones(4))
    assert evidence.count.tolist() == [1, 1, 0, 0] and evidence.total.tolist() == [-1, 1, 0, 0]


def test_a_chain_that_a_window_meets_often_gains_nothing_by_that():
    times = torch.tensor([5, 5, 1, 1, 0])
    slopes = torch.tensor([1.0, 2.0, 1.0, 2.0, 0.0])
    often, once = (InstanceEvidence(torch.zeros(5, dtype=torch.int64)) for _ in range(2))
    often.add(times * slopes, times)
    once.add(slopes, (times > 0).long())
    assert often.total.tolist() == once.total.tolist() == [1, -1, 1, -1, 0]


def test_chains_are_named_by_their_images_too():
    def digest(*images: str) -> str:
        return chain_digest(Chain("How many?", ("Two.",), tuple(map(Path, images)), domain=0), ["a"])

    assert digest("here/1.png") == digest("there/1.png")
    assert len({digest("1.png"), digest("2.png"), digest(), digest("1.png", "2.png")}) == 4


def test_the_page_shows_what_can_still_be_read(tmp_path):
    image = draw_cells(tmp_path / "cells.png")
    pictures = ((image,), (tmp_path / "gone.png",))
    chains = [Chain("One\ntwo?", ("Two.",), one, targets=(0.5,), domain=0) for one in pictures]
    evidence = InstanceEvidence(torch.zeros(2, dtype=torch.int64))
    evidence.add(torch.tensor([1.0, -2.0]), torch.ones(2))
    page = instance_page(SimpleNamespace(train=chains, domains=["a"]), torch.tensor([0.5, 1.5]), evidence)
    assert page.count("<section>") == 2 and page.count("data:image/png") == 1
    assert "image 1 of the question: " in page and "gone.png" in page and "compared in 1 window<" in page
    assert "chance may explain all differences" in page


@pytest.fixture
def run(demo, monkeypatch):
    """Flags of a run of 6 windows with the tiny backbone, in which chance moves the chains' weights too."""
    monkeypatch.setattr(instance_evidence, "CHANCE", -2.0)
    sizes = ("--iteration_num", "12", "--unroll_steps", "2", "--meta_batch_size", "4", "--meta_optimizer", "calm")
    return lambda output, *more: flags(demo, output, "--reward_model", str(tiny_backbone()), *sizes, *more)


def saved(folder) -> dict[str, list]:
    return pyarrow.parquet.read_table(folder / "instance_weights.parquet").to_pydict()


@pytest.mark.parametrize("what", [pytest.param("instance", marks=pytest.mark.slow), "both"])
def test_a_run_learns_saves_and_resumes(run, tmp_path, monkeypatch, what, capsys):
    main(run(tmp_path / "whole", "--weights_for", what))
    assert "hypergradient: finite_difference: it finds a slope for each chain" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("reweighting.main.StopSignals", lambda: StopAtStep(9))
        with pytest.raises(Stopped):
            main(run(tmp_path / "cut", "--weights_for", what))
    main(run(tmp_path / "cut", "--weights_for", what, "--resume"))
    same_results(tmp_path / "whole", tmp_path / "cut")
    found = saved(tmp_path / "whole")
    assert found == saved(tmp_path / "cut")
    assert max(found["weight"]) > 1.1 > 0.9 > min(found["weight"]) > 0
    assert sum(found["windows"]) == 6 * 2 * 5 * 2  # windows, steps, micro-batches, chains
    assert sorted(row for rows in found["rows"] for row in rows) == list(range(200))
    means = {}
    for domain, weight in zip(found["domain"], found["weight"], strict=True):
        means.setdefault(domain, []).append(weight)
    means = {domain: float(np.mean(one)) for domain, one in means.items()}
    assert means == pytest.approx(weights(tmp_path / "whole"), rel=1e-5)
    page = (tmp_path / "whole" / "instance_weights.html").read_text()
    assert page.count("<section>") == 24 and page.count("data:image/png") == 24
    assert "chance may explain" not in page and "Lowest weights" in page and f"{min(found['weight']):.2f} · " in page


def test_learned_weights_train_again(run, demo, tmp_path, capsys):
    main(run(tmp_path / "first", "--weights_for", "both"))
    path = tmp_path / "first" / "instance_weights.parquet"
    rows = json.loads((demo / "train.json").read_text())
    (tmp_path / "turned.json").write_text(json.dumps(rows[100:] + rows[:100]))  # the same chains in another order
    again = ("--reward_model", str(tiny_backbone()), "--instance_weights", str(path), "--image_root", str(demo))
    main(flags(demo, tmp_path / "again", *again, "--train_json_file", str(tmp_path / "turned.json")))
    assert weights(tmp_path / "again") == pytest.approx(weights(tmp_path / "first"), rel=1e-5)
    turned = ("--train_json_file", str(tmp_path / "turned.json"), "--image_root", str(demo))
    with pytest.raises(UserError, match="content of the training or meta data has changed .* belong to the chains"):
        main(run(tmp_path / "first", "--weights_for", "both", *turned, "--resume", "--allow_changed_settings"))
    (tmp_path / "more.json").write_text(json.dumps([rows[0] | {"input": "Question: A new one?"}, *rows[1:]]))
    with pytest.raises(UserError, match=r"1 of 41 training chains have no weight in it, first .*: rows? 0"):
        main(flags(demo, tmp_path / "lacks", *again, "--train_json_file", str(tmp_path / "more.json")))
    (tmp_path / "broken.parquet").write_bytes(path.read_bytes()[:-20])
    for bad, message in (
        (tmp_path / "broken.parquet", "expected a run's instance_weights.parquet"),
        (demo / "train.json", "expected a run's instance_weights.parquet"),
        (tmp_path / "none.parquet", "No such file"),
    ):
        with pytest.raises(UserError, match=f"{bad}: .*{message}"):
            main(flags(demo, tmp_path / "bad", *again, "--instance_weights", str(bad)))


def test_the_published_form_learns_resumes_and_trains_again(demo, tmp_path, monkeypatch, capsys):
    """With steps so large that some weights are negative."""
    tiny = ("--reward_model", str(tiny_backbone()))
    published = (*tiny, "--weights_for", "instance", "--instance_activation", "clip", "--meta_lr", "1.2")
    main(flags(demo, tmp_path / "whole", *published))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("reweighting.main.StopSignals", lambda: StopAtStep(7))
        main(flags(demo, tmp_path / "cut", *published))
    main(flags(demo, tmp_path / "cut", *published, "--resume"))
    same_results(tmp_path / "whole", tmp_path / "cut")
    found = saved(tmp_path / "whole")
    assert min(found["weight"]) == -1 and max(found["weight"]) == 3
    mean = np.mean(list(weights(tmp_path / "whole").values()))
    printed = capsys.readouterr()
    assert mean != pytest.approx(1, abs=1e-3) and f"updates (mean {mean:.3g})" in printed.out
    lowest = min(weights(tmp_path / "whole").values())
    assert lowest < 0 and f"is negative ({lowest:.2f})" in printed.err
    path = tmp_path / "whole" / "instance_weights.parquet"
    main(flags(demo, tmp_path / "again", *tiny, "--instance_weights", str(path), "--iteration_num", "5"))
    scaled = {domain: weight / mean for domain, weight in weights(tmp_path / "whole").items()}
    assert weights(tmp_path / "again") == pytest.approx(scaled, abs=1e-6)


@pytest.mark.parametrize("values", [(-1.0, -2.0, -1.0), (0.0, 0.0, 0.0), (1.0, float("nan"), 1.0)])
def test_weights_of_no_positive_mean_are_refused(tmp_path, values):
    chains = [Chain(str(number), ("One.",), domain=0) for number in range(3)]
    names = [chain_digest(chain, ["a"]) for chain in chains]
    pyarrow.parquet.write_table(pyarrow.table({"chain": names, "weight": values}), tmp_path / "w.parquet")
    with pytest.raises(UserError, match="w.parquet: weights must be finite, and their mean more than 0"):
        read_instance_weights(str(tmp_path / "w.parquet"), SimpleNamespace(train=chains, domains=["a"]))


def test_weights_are_computed_once_between_two_updates(run, tmp_path, monkeypatch):
    computed = []
    forward = InstanceWeights.forward
    monkeypatch.setattr(InstanceWeights, "forward", lambda table: computed.append(table) or forward(table))
    main(run(tmp_path / "held", "--weights_for", "both"))
    assert len(computed) < 6 * 2 * 5  # 6 windows of 10 micro-batches
    monkeypatch.setattr(InstanceWeights, "held", lambda table: table().detach())
    main(run(tmp_path / "anew", "--weights_for", "both"))
    same_results(tmp_path / "held", tmp_path / "anew")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--instance_activation", "relu"), "--instance_activation relu leaves the weights unscaled, .* instance, or"),
        (
            ("--weights_for", "instance", "--instance_activation", "clip", "--meta_optimizer", "calm"),
            "--instance_activation clip is trained by gradient steps: use --meta_optimizer adamw",
        ),
        (
            ("--weights_for", "domain", "--instance_activation", "softplus"),
            "--instance_activation does nothing without --weights_for instance or both",
        ),
        (("--hypergradient", "unrolled"), "unrolled finds no slope of a single chain, which --weights_for both needs"),
        (("--weights_for", "instance", "--min_weight", "0.2"), "--min_weight does nothing with --weights_for instance"),
        (("--hypergradient", "darts"), "darts finds no slope of a single chain"),
        (("--instance_weights", "w.parquet"), "--weights_for does nothing with .*--instance_weights"),
    ],
)
def test_flags_that_contradict_each_other(demo, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        main(flags(demo, tmp_path, "--reward_model", str(tiny_backbone()), "--weights_for", "both", *more))
    for other, message in (
        ("--domain_weights", "the weights of the domains too"),
        ("--baseline", "weights every domain 1"),
    ):
        with pytest.raises(UserError, match=message):
            main(
                flags(demo, tmp_path, "--instance_weights", "w", other, *(["w"] if other == "--domain_weights" else []))
            )


def test_instances_of_a_single_domain_can_be_weighted(run, demo, tmp_path, capsys):
    rows = [row | {"dataset": "all"} for row in json.loads((demo / "train.json").read_text())]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    one = ("--train_json_file", str(tmp_path / "train.json"), "--image_root", str(demo))
    main(run(tmp_path / "run", *one, "--weights_for", "instance"))
    assert weights(tmp_path / "run") == {"all": pytest.approx(1)} and len(history(tmp_path / "run")) == 6
    assert "There is a single domain: nothing to compare it with" in capsys.readouterr().out
    with pytest.raises(UserError, match="domain"):
        main(run(tmp_path / "both", *one, "--weights_for", "both"))
