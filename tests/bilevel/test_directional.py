"""The hypergradient without kept gradients against autograd through the unrolled optimizer, and in the real command."""

import copy
from functools import partial

import pytest
import torch
from tests.test_hypergradient import DECAY, DOMAINS, LR, toy_batch, toy_loss, unrolled
from tests.test_resume import cut_and_resume
from torch import nn

from reweighting.bilevel.hypergradients.directional import DirectionalHypergradient, central_differences, forward_mode
from reweighting.bilevel.hypergradients.unrolled import UnrolledHypergradient
from reweighting.distributed.flat_vectors import flatten, unflatten
from reweighting.errors import UserError
from reweighting.main import main
from reweighting.training.checkpoints import load_checkpoint
from tests.runs import flags, history, same_results
from tests.tiny import tiny_backbone

DIRECTIONAL_METHODS = {"jvp": forward_mode, "finite_difference": central_differences}


def compared(kind, momentum, warm_up, accumulation, clip, slopes, count=5, seed=0):
    """Cosine with the exact hypergradient and ratio of the norms, after `warm_up` steps. slopes: None for an
    UnrolledHypergradient."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    params, weights = dict(model.named_parameters()), torch.rand(DOMAINS, dtype=torch.float64) + 0.5
    if kind == "sgd":
        optimizer = torch.optim.SGD(params.values(), lr=LR[kind], momentum=momentum, weight_decay=DECAY)
    else:
        optimizer = torch.optim.AdamW(params.values(), lr=LR[kind], weight_decay=DECAY)

    batches = [
        [((step * accumulation + i) % DOMAINS, toy_batch()) for i in range(accumulation)]
        for step in range(warm_up + count)
    ]

    def draw(number):
        return batches[number // accumulation][number % accumulation]

    loss_at = partial(toy_loss, model)
    window = (
        UnrolledHypergradient(optimizer)
        if slopes is None
        else DirectionalHypergradient(optimizer, params, loss_at, draw, slopes)
    )

    def step(number):
        grad = 0
        for i, (domain, batch) in enumerate(batches[number]):
            loss = weights[domain] * toy_loss(model, params, batch) / accumulation
            share = flatten(torch.autograd.grad(loss, list(params.values())))
            grad = grad + share
            window.add_micro_batch(*((domain, share) if slopes is None else (number * accumulation + i, domain, batch)))
        factor = min(1.0, clip / grad.norm().item()) if clip else 1.0
        for param, piece in zip(params.values(), unflatten(grad * factor, list(params.values())), strict=True):
            param.grad = piece
        optimizer.step()
        window.close_step(factor, LR[kind])

    for number in range(warm_up):
        step(number)
    window.clear()
    start = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    state = {name: copy.deepcopy(optimizer.state[p]) for name, p in params.items()}
    meta, exact_weights = toy_batch(), weights.clone().requires_grad_()
    after = unrolled(kind, model, start, state, exact_weights, batches[warm_up:], clip, momentum)
    exact = torch.autograd.grad(toy_loss(model, after, meta), exact_weights)[0]

    for number in range(warm_up, warm_up + count):
        step(number)
    v = flatten(torch.autograd.grad(toy_loss(model, params, meta), list(params.values())))
    ours = window.hypergradient(v.clone(), weights)
    if slopes is not None:
        resumed = DirectionalHypergradient(optimizer, params, loss_at, draw, slopes)
        resumed.load(window.state(None), None, "cpu")
        assert torch.equal(resumed.hypergradient(v.clone(), weights), ours)
    return torch.cosine_similarity(exact, ours, dim=0).item(), (ours.norm() / exact.norm()).item()


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("slopes", DIRECTIONAL_METHODS.values(), ids=DIRECTIONAL_METHODS)
@pytest.mark.parametrize(
    ("kind", "momentum", "warm_up"), [("sgd", 0.0, 10), ("sgd", 0.9, 10), ("adamw", 0.0, 100), ("adamw", 0.0, 500)]
)
def test_replay_is_near_autograd_through_the_optimizer(kind, momentum, warm_up, slopes, clip):
    for seed in range(2):
        cosine, ratio = compared(kind, momentum, warm_up, 2, clip, slopes, seed=seed)
        assert cosine >= 0.99, (cosine, ratio)
        assert 0.92 <= ratio <= 1.08, (cosine, ratio)


def test_a_weight_has_no_slope_where_its_domain_alone_is_clipped():
    optimizer = torch.optim.SGD([weight := nn.Parameter(torch.tensor([0.5, -1.0]))], lr=0.1)

    def loss(at, batch):
        return (at["weight"] @ batch).square()

    replay = DirectionalHypergradient(optimizer, {"weight": weight}, loss, None, forward_mode)
    batch = torch.tensor([1.0, 2.0])
    loss({"weight": weight}, batch).backward()
    replay.add_micro_batch(0, 0, batch)
    replay.close_step(0.5, 0.1)
    assert replay.hypergradient(torch.tensor([1.0, 1.0]), torch.tensor([1.3])).abs() < 1e-6


@pytest.mark.parametrize("hypergradient", DIRECTIONAL_METHODS)
def test_in_the_command_it_is_near_the_window(demo, tmp_path, hypergradient):
    more = ("--reward_model", str(tiny_backbone()), "--optimizer", "sgd", "--lr", "0.01", "--gradient_checkpointing")
    gradients = []
    for name in ("unrolled", hypergradient):
        main(flags(demo, tmp_path / name, *more, "--iteration_num", "5", "--hypergradient", name))
        state = load_checkpoint(tmp_path / name / "checkpoints/step-00000005")["problems"]["upper"]["optimizer"]
        gradients.append(state[0]["exp_avg"])
    assert history(tmp_path / "unrolled")[0]["train_loss"] == history(tmp_path / hypergradient)[0]["train_loss"]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    assert 0.95 < gradients[1].norm() / gradients[0].norm() < 1.05


def test_a_window_without_gradients_resumes(demo, tmp_path, monkeypatch):
    run = ("--reward_model", str(tiny_backbone()), "--hypergradient", "jvp", "--max_grad_norm", "0.05")
    run += ("--lora_rank", "2", "--precision", "bf16")
    main(flags(demo, tmp_path / "whole", *run))
    cut_and_resume(monkeypatch, flags(demo, tmp_path / "cut", *run), 8)
    same_results(tmp_path / "whole", tmp_path / "cut")


def test_the_way_can_be_changed_between_windows(demo, tmp_path, monkeypatch):
    tiny = ("--reward_model", str(tiny_backbone()))

    def run(folder, way):
        return flags(demo, tmp_path / folder, *tiny, "--hypergradient", way)

    cut_and_resume(monkeypatch, run("a", "jvp"), 5, "--hypergradient", "unrolled", "--allow_changed_settings")
    assert len(history(tmp_path / "a")) == 2
    with pytest.raises(UserError, match="between windows only"):
        cut_and_resume(monkeypatch, run("b", "jvp"), 7, "--hypergradient", "unrolled", "--allow_changed_settings")
    cut_and_resume(monkeypatch, run("c", "jvp"), 7, "--hypergradient", "auto")  # goes on in the same way
    main(run("d", "jvp"))
    assert history(tmp_path / "c")[1]["weights"] == history(tmp_path / "d")[1]["weights"]
