"""`DirectionalHypergradient` against autograd through the unrolled optimizer, and in the real command."""

import pytest
import torch
from torch import nn

from reweighting.bilevel.hypergradients.base import WindowSize
from reweighting.bilevel.hypergradients.derivatives import central_differences, forward_mode
from reweighting.bilevel.hypergradients.directional import DirectionalHypergradient
from reweighting.bilevel.losses import STEP_LOSSES, loss_at_parameters
from reweighting.config.training import TrainingConfig
from reweighting.distributed.flat_vectors import flatten
from reweighting.errors import UserError
from reweighting.main import main
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.training.checkpoints import load_checkpoint
from reweighting.training.run_data import read_run_data
from tests.bilevel.unrolling import Case, cosine_and_ratio
from tests.runs import flags, history, same_results
from tests.tiny import tiny_backbone
from tests.training.test_resume import cut_and_resume

DERIVATIVES = {"jvp": forward_mode, "finite_difference": central_differences}


def make(case: Case, derivative) -> DirectionalHypergradient:
    return DirectionalHypergradient(case.optimizer, case.params, case.loss, derivative, case.by_chain, case.labels)


@pytest.mark.parametrize("by_chain", [False, True], ids=["domains", "chains"])
@pytest.mark.parametrize("loss", STEP_LOSSES)
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
@pytest.mark.parametrize(
    ("kind", "momentum", "before"), [("sgd", 0.0, 10), ("sgd", 0.9, 10), ("adamw", 0.0, 100), ("adamw", 0.0, 500)]
)
def test_it_is_near_autograd_through_the_optimizer(kind, momentum, before, derivative, clip, loss, by_chain):
    for seed in range(2):
        case = Case(kind, momentum, before, clip=clip, seed=seed, loss_name=loss, by_chain=by_chain)
        hypergradient = make(case, derivative)
        exact, v = case.window(hypergradient)
        resumed = make(case, derivative)
        resumed.load(hypergradient.state(), case.fetch_batch)
        found = hypergradient.compute(v.clone(), case.weights)
        assert torch.equal(resumed.compute(v.clone(), case.weights), found)
        met = [number for step in case.batches[before:] for _, batch in step for number in batch.chain_ids.tolist()]
        assert not by_chain or hypergradient.times_met.tolist() == [met.count(chain) for chain in range(len(found))]
        cosine, ratio = cosine_and_ratio(exact, found)
        least = 0.99 if not by_chain else 0.999 if loss == "mse" else 0.998
        assert cosine >= least and 0.92 <= ratio <= 1.08, (cosine, ratio)


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_rounding_in_float32_leaves_the_slopes_of_chains_exact(derivative, demo):
    """`auto` takes differences in float32."""
    torch.manual_seed(0)
    model = ProcessRewardModel.from_backbone(tiny_backbone())
    config = TrainingConfig.parse(flags(demo, demo))
    batch = model.make_batch(read_run_data(config).train[:12])
    loss = loss_at_parameters(model, "fp32")
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}

    def gradient(part):
        found = torch.autograd.grad(
            part, list(params.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return flatten(found)

    gradients = torch.stack([gradient(part) for part in loss(params, batch)])  # [12, P]
    direction = gradients[:6].sum(0).sign()  # of AdamW's first step
    (found,) = derivative(loss, params, [batch], direction)
    assert torch.cosine_similarity(gradients @ direction, found, dim=0) > 0.9999


@pytest.mark.parametrize(
    ("by_chain", "clip", "derivative"),
    [(False, 0.0, forward_mode), (True, 0.05, forward_mode), (False, 0.05, central_differences)],
    ids=["domains", "chains-clipped", "differences"],
)
@pytest.mark.parametrize("loss", STEP_LOSSES)
@pytest.mark.parametrize(("kind", "momentum", "before"), [("sgd", 0.0, 10), ("sgd", 0.9, 10), ("adamw", 0.0, 100)])
def test_the_slopes_of_labels_are_near_autograd_through_the_optimizer(
    kind, momentum, before, loss, by_chain, clip, derivative
):
    case = Case(kind, momentum, before, clip=clip, loss_name=loss, by_chain=by_chain, corrects=True)
    hypergradient = make(case, derivative)
    _, v = case.window(hypergradient)
    resumed = make(case, derivative)
    resumed.load(hypergradient.state(), case.fetch_batch)
    weights = hypergradient.compute(v.clone(), case.weights)
    found, times_met = hypergradient.label_slopes
    assert torch.equal(resumed.compute(v.clone(), case.weights), weights)
    assert torch.equal(resumed.label_slopes.gradient, found)
    met = [number for step in case.batches[before:] for _, batch in step for number in batch.chain_ids.tolist()]
    assert times_met.tolist() == [met.count(chain) for chain in range(len(found))]
    cosine, ratio = cosine_and_ratio(case.exact_labels, found)
    assert cosine >= 0.999 and 0.92 <= ratio <= 1.08, (cosine, ratio)


def test_a_weight_has_no_slope_where_its_domain_alone_is_clipped():
    optimizer = torch.optim.SGD([weight := nn.Parameter(torch.tensor([0.5, -1.0]))], lr=0.1)

    def loss(at, batch):
        return (at["weight"] @ batch).square()[None]

    hypergradient = DirectionalHypergradient(optimizer, {"weight": weight}, loss, forward_mode)
    batch = torch.tensor([1.0, 2.0])
    gradient = torch.autograd.grad(loss({"weight": weight}, batch), weight)
    hypergradient.add_micro_batch(0, 0, batch, gradient)
    hypergradient.close_step(gradient[0], 0.5, 0.1)
    assert hypergradient.compute(torch.tensor([1.0, 1.0]), torch.tensor([1.3])).abs() < 1e-6


def test_a_window_whose_steps_were_all_left_out_moves_no_weight():
    case = Case("sgd")
    hypergradient = make(case, forward_mode)
    hypergradient.add_micro_batch(0, *case.fetch_batch(0), [torch.ones(1)])
    hypergradient.drop_step()
    v = torch.ones(193, dtype=torch.float64)
    assert torch.equal(hypergradient.compute(v, case.weights), torch.zeros(4, dtype=torch.float64))


def test_it_keeps_micro_batches_and_no_gradients():
    hypergradient = make(Case("adamw"), forward_mode)
    window = WindowSize(vector=10**9, steps=5, micro_batches=3, batch=1000)
    assert hypergradient.memory_bytes(window).kept == 5 * 3 * 1000


@pytest.mark.parametrize(("hypergradient", "loss"), [("jvp", "mse"), ("finite_difference", "mse"), ("jvp", "bce")])
def test_in_the_command_it_is_near_unrolled(demo, tmp_path, hypergradient, loss):
    lr = {"mse": "0.01", "bce": "0.003"}[loss]  # whose gradients are larger: both methods are exact to first order
    more = ("--reward_model", str(tiny_backbone()), "--optimizer", "sgd", "--lr", lr, "--gradient_checkpointing")
    more += ("--lower_loss", loss)
    gradients = []
    for name in ("unrolled", hypergradient):
        main(flags(demo, tmp_path / name, *more, "--iteration_num", "5", "--hypergradient", name))
        state = load_checkpoint(tmp_path / name / "checkpoints/step-00000005")["problems"]["upper"]["optimizer"]
        gradients.append(state[0]["exp_avg"])
    assert history(tmp_path / "unrolled")[0]["train_loss"] == history(tmp_path / hypergradient)[0]["train_loss"]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    assert 0.95 < gradients[1].norm() / gradients[0].norm() < 1.05


@pytest.mark.slow
def test_a_window_without_gradients_resumes(demo, tmp_path, monkeypatch):
    run = ("--reward_model", str(tiny_backbone()), "--hypergradient", "jvp", "--max_grad_norm", "0.05")
    run += ("--lora_rank", "2", "--precision", "bf16", "--lower_loss", "bce")
    main(flags(demo, tmp_path / "whole", *run))
    cut_and_resume(monkeypatch, flags(demo, tmp_path / "cut", *run), 8)
    same_results(tmp_path / "whole", tmp_path / "cut")


def test_the_method_can_be_changed_between_windows(demo, tmp_path, monkeypatch):
    tiny = ("--reward_model", str(tiny_backbone()))

    def run(folder, method):
        return flags(demo, tmp_path / folder, *tiny, "--hypergradient", method)

    cut_and_resume(monkeypatch, run("a", "jvp"), 5, "--hypergradient", "unrolled", "--allow_changed_settings")
    assert len(history(tmp_path / "a")) == 2
    for before, after in (("jvp", "unrolled"), ("unrolled", "jvp"), ("darts", "unrolled")):
        with pytest.raises(UserError, match="between windows only"):
            more = ("--hypergradient", after, "--allow_changed_settings")
            cut_and_resume(monkeypatch, run(f"{before}-{after}", before), 7, *more)
    cut_and_resume(monkeypatch, run("c", "jvp"), 7, "--hypergradient", "auto")  # continues with the same method
    main(run("d", "jvp"))
    assert history(tmp_path / "c")[1]["weights"] == history(tmp_path / "d")[1]["weights"]
