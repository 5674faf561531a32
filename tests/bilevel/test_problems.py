"""The two Betty problems in their engine, against the same mathematics written out plainly."""

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from betty.configs import Config
from torch.func import functional_call

from reweighting import main
from reweighting.bilevel.domain_weights import DomainWeights, FixedWeights
from reweighting.bilevel.evidence import SlopeEvidence
from reweighting.bilevel.hypergradients import make_hypergradient
from reweighting.bilevel.losses import STEP_LOSSES, centering_groups, cross_entropy, mean_loss
from reweighting.bilevel.problems import DomainReweighting, PRMFineTuning
from reweighting.config.training import LowerLossName, TrainingConfig
from reweighting.data.chains import Chain
from reweighting.errors import UserError
from reweighting.modeling.collate import collate
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.training.engine import ReweightingEngine
from reweighting.training.run_data import read_run_data
from tests.runs import flags
from tests.tiny import tiny_backbone

DOMAINS, LR, UNROLL, ACCUMULATION = ["a", "b", "c"], 1e-3, 2, 2


def random_chain(generator: torch.Generator, domain: int = -1, label: float = math.nan) -> Chain:
    def number() -> int:
        return int(torch.randint(100, (1,), generator=generator))

    count = 1 + number() % 3
    steps = tuple(f"Step {i}: {number()} is {number()}." for i in range(1, count + 1))
    targets = tuple(number() / 100 for _ in range(count)) if domain >= 0 else ()
    return Chain(f"What is {number()}?", steps, (), targets, label, domain)


class Fixture:
    """A double-precision tiny model and the batches of a run, by micro-step and by update."""

    def __init__(self):
        torch.manual_seed(3)
        self.model = ProcessRewardModel.from_backbone(tiny_backbone(), attn_implementation="eager").double()
        torch.nn.init.normal_(self.model.score_head.weight, std=0.3)
        generator = torch.Generator().manual_seed(4)
        self.train = [
            (i % 3, self.batch([random_chain(generator, i % 3) for _ in range(3)])) for i in range(4 * ACCUMULATION)
        ]
        meta = [[random_chain(generator, label=float(j % 2)) for j in range(6)] for _ in range(2)]
        for chains in meta:  # three answers to one question, an incorrect one and two correct ones
            chains[3] = replace(chains[3], question=chains[0].question)
            chains[5] = replace(chains[5], question=chains[0].question)
        self.meta = [[self.batch(chains[:2]), self.batch(chains[2:])] for chains in meta]

    def batch(self, chains):
        return collate([self.model.chain_tokenizer.encode(chain) for chain in chains])

    def engine(
        self,
        folder: Path,
        method="unrolled",
        fixed_weights=None,
        iterations=UNROLL,
        positive_rate=None,
        loss="mse",
        lr=LR,
    ):
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        config = Config(unroll_steps=UNROLL, gradient_accumulation=ACCUMULATION)
        hypergradient = None if fixed_weights is not None else make_hypergradient(method, self.model, optimizer)
        lower = PRMFineTuning(
            config,
            self.model,
            optimizer,
            self.train.__getitem__,
            learning_rate=lambda step: lr,
            step_loss=STEP_LOSSES[loss],
            hypergradient=hypergradient,
            fixed_weights=None if fixed_weights is None else FixedWeights(fixed_weights),
        )
        upper = None
        if fixed_weights is None:
            table = DomainWeights(DOMAINS).double()
            table.alpha.data = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64)
            meta_optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
            upper = DomainReweighting(
                Config(),
                table,
                meta_optimizer,
                self.meta.__getitem__,
                hypergradient=hypergradient,
                evidence=SlopeEvidence(len(DOMAINS), 8.0),
                positive_rate=positive_rate,
            )
        return ReweightingEngine(lower, upper, DOMAINS, torch.device("cpu"), folder, iterations, 100, {})


PLAIN = {
    "mse": lambda s, p: (s - p) ** 2,
    "bce": lambda s, p: -p * s.log() - (1 - p) * (1 - s).log(),
}


def plain_lower_loss(model, params, batch, loss="mse"):
    scores = functional_call(model, params, (batch,)).sigmoid()
    errors = [
        PLAIN[loss](scores[row, step], batch.targets[row, step].double())
        for row in range(len(scores))
        for step in range(scores.shape[1])
        if batch.target_mask[row, step]
    ]
    return sum(errors) / len(errors)


def plain_meta_loss(model, params, batches, positive_rate=None):
    aggregates, labels = [], []
    for batch in batches:
        logits = functional_call(model, params, (batch,))
        aggregates += [logits[row, : int(batch.step_mask[row].sum())].mean() for row in range(len(logits))]
        labels += batch.labels
    if positive_rate is not None:
        same, others = (0, 3, 5), (1, 2, 4)
        for members, share in ((same, 2 / 3), (others, positive_rate)):
            middle = sum(aggregates[i] for i in members) / 3
            for i in members:
                aggregates[i] = aggregates[i] - middle + math.log(share / (1 - share))
    losses = [(one.sigmoid() - label) ** 2 for one, label in zip(aggregates, labels, strict=True)]
    return sum(losses) / len(losses)


# The cross-entropy is more curved, and the hypergradient leaves out what is of second order in the learning rate.
@pytest.mark.parametrize(("positive_rate", "loss", "lr"), [(None, "mse", LR), (0.3, "mse", LR), (0.3, "bce", LR / 10)])
def test_a_window_of_both_levels_equals_the_plain_formulas(tmp_path, positive_rate, loss, lr):
    fixture = Fixture()
    model = fixture.model
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    engine = fixture.engine(tmp_path, positive_rate=positive_rate, loss=loss, lr=lr)
    alpha = engine.upper.module.alpha
    start = alpha.detach().clone().requires_grad_()

    positive = torch.log1p(start.exp())
    weights = positive / positive.mean()
    current = params
    for step in range(UNROLL):  # autograd through every step
        part = fixture.train[step * ACCUMULATION : (step + 1) * ACCUMULATION]
        total = sum(weights[d] * plain_lower_loss(model, current, batch, loss) for d, batch in part) / ACCUMULATION
        grads = torch.autograd.grad(total, list(current.values()), create_graph=True, allow_unused=True)
        current = {
            name: value if grad is None else value - lr * grad
            for (name, value), grad in zip(current.items(), grads, strict=True)
        }
    meta = plain_meta_loss(model, current, fixture.meta[0], positive_rate)
    exact = torch.autograd.grad(meta, start)[0]

    engine.run()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), current[name].detach(), rtol=0, atol=1e-12)
    ours = start.detach() - alpha.detach()  # SGD with learning rate 1: the step is the gradient
    assert torch.cosine_similarity(exact, ours, dim=0) >= 0.999
    assert 0.98 <= ours.norm() / exact.norm() <= 1.02
    assert abs(ours.sum()) > 0 and engine.updates == 1


def test_the_flag_names_the_losses():
    assert tuple(STEP_LOSSES) == get_args(LowerLossName)


def test_cross_entropy_of_extreme_logits_is_finite():
    batch = replace(Fixture().train[0][1], num_labeled_steps=2)
    batch = replace(batch, targets=torch.tensor([[0.25, 0.25]]), target_mask=torch.ones(1, 2, dtype=torch.bool))
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = mean_loss(cross_entropy(logits, batch), batch)
    loss.backward()
    assert loss.item() == pytest.approx((0.75 * 200 + 0.25 * 200) / 2)
    assert logits.grad.tolist() == [[0.375, -0.125]]


def test_answers_are_compared_with_those_to_the_same_question():
    def group(*answers):
        chains = [Chain(question, ("a",), images, label=label) for question, images, label in answers]
        groups, levels = centering_groups(chains, 0.25)
        return groups.tolist(), levels.sigmoid().tolist()

    a, b = (Path("a.png"),), (Path("b.png"),)
    pairs = [("p", a, 1.0), ("q", a, 0.0), ("p", a, 0.0), ("q", a, 1.0)]
    assert group(*pairs) == ([0, 1, 0, 1], [0.5, 0.5])
    # The same words under another image are another question; questions with answers of one kind stand together.
    groups, levels = group(*pairs[:2], ("p", b, 0.0), ("r", a, 0.0), ("r", a, 0.0), ("q", a, 1.0))
    assert groups == [1, 0, 1, 1, 1, 0] and levels == pytest.approx([0.5, 0.25])


def test_fixed_weights_train_the_weighted_sum(tmp_path):
    fixture = Fixture()
    weights = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    params = {name: p.detach().clone().requires_grad_() for name, p in fixture.model.named_parameters()}
    part = fixture.train[:ACCUMULATION]
    loss = sum(weights[d] * plain_lower_loss(fixture.model, params, batch) for d, batch in part) / ACCUMULATION
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
    fixture.engine(tmp_path, fixed_weights=weights, iterations=1).run()
    for (name, parameter), grad in zip(fixture.model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.detach(), (params[name] - LR * grad).detach(), rtol=0, atol=1e-12)


def test_bettys_darts_can_be_chosen(tmp_path):
    fixture = Fixture()
    engine = fixture.engine(tmp_path, "darts")
    before = engine.upper.module.alpha.detach().clone()
    engine.run()
    assert engine.upper.module.alpha.isfinite().all()
    assert not torch.equal(engine.upper.module.alpha, before)


def test_a_lower_level_has_either_a_hypergradient_or_fixed_weights():
    model = Fixture().model
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for given in ({}, {"hypergradient": make_hypergradient("unrolled", model, optimizer), "fixed_weights": [1.0]}):
        with pytest.raises(ValueError, match="a hypergradient or fixed weights"):
            PRMFineTuning(Config(), model, optimizer, None, learning_rate=None, **given)


def test_weights_that_are_no_numbers_end_the_run(tmp_path):
    engine = Fixture().engine(tmp_path)
    engine.upper.optimizer.param_groups[0]["lr"] = math.inf
    with pytest.raises(UserError, match="a domain weight is not finite at step 2: lower --meta_lr"):
        engine.run()


def test_a_weight_that_has_become_0_stays_0(tmp_path):
    engine = Fixture().engine(tmp_path)
    engine.upper.module.alpha.data[1] = -1e4
    engine.run()
    assert engine.weights()["b"] == 0 and all(map(math.isfinite, engine.weights().values()))


def test_the_weights_lie_where_the_model_computes(demo, tmp_path, monkeypatch):
    """On a GPU, that is; the device without memory stands for it here."""
    monkeypatch.setattr(main, "choose_device", lambda name: torch.device("meta"))
    config = TrainingConfig.parse(flags(demo, tmp_path, "--reward_model", str(tiny_backbone()), "--optimizer", "sgd"))
    engine = main.build_engine(config, {"precision": "fp32", "validation": None}, read_run_data(config), tmp_path)
    assert engine.upper.module.alpha.device.type == "meta"
