"""The memory estimate, exact where sizes are known, and what is planned with it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from reweighting import run as run_module
from reweighting.arguments import parse_arguments
from reweighting.checkpoints import checkpoints, load_checkpoint
from reweighting.errors import UserError
from reweighting.hypergradient_plan import has_forward_mode, plan_hypergradient
from reweighting.live_memory import on_shapes, step_memory
from reweighting.main import main
from reweighting.memory_estimate import MemoryEstimate
from reweighting.reward_model import ProcessRewardModel
from reweighting.run import estimate_memory
from reweighting.run_data import read_run_data
from tests.runs import flags
from tests.tiny import tiny_backbone

CPU = torch.device("cpu")


def test_what_a_step_takes_is_counted():
    """Two layers by hand: a matrix product saves its input, tanh its output."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    model, x = on_shapes(model), torch.randn(32, 8)
    assert all(parameter.device == CPU for parameter in model.parameters())
    saved, peak = step_memory(lambda: model(x).sum(), list(model.parameters()), [*model.parameters(), x])
    hidden, output = 4 * 32 * 16, 4 * 32 * 4
    assert hidden <= saved <= hidden + 4  # its output, which is what the second layer reads, and the loss
    weights = 4 * (8 * 16 + 16 * 4)
    assert saved + weights / 3 < peak <= saved + weights + 2 * hidden + 2 * output


def test_checkpointing_saves_memory_on_shapes_too():
    with torch.device("meta"):
        layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(8))
    on_shapes(layers)
    x = torch.randn(1000, 64)

    def loss(again: bool):
        h = x
        for layer in layers:
            h = checkpoint(layer, h, use_reentrant=False) if again else layer(h)
        return h.sum()

    plain, again = (step_memory(lambda on=on: loss(on), list(layers.parameters()), [x]) for on in (False, True))
    assert again[0] < 0.6 * plain[0] and again[1] < 0.8 * plain[1]


@pytest.fixture
def estimated(demo, tmp_path):
    """(flags) -> the estimate of a run on the demo, the model it is for, its arguments."""

    def estimate(*more):
        args = parse_arguments(flags(demo, tmp_path, "--reward_model", str(tiny_backbone()), *more))
        model = run_module.make_model(args, CPU, "fp32")
        return estimate_memory(args, read_run_data(args), CPU, "fp32"), model

    return estimate


@pytest.mark.parametrize(
    ("more", "optimizer", "kept"),
    [
        ((), 2, 5 * 2 + 2),
        (("--lora_rank", "2"), 2, 5 * 2 + 2),
        (("--no_freeze_vision", "--gradient_accumulation", "3"), 2, 5 * 3 + 2),
        (("--optimizer", "sgd"), 1, 5 * 2),
        (("--hypergradient", "sama"), 3, 0),
        (("--baseline",), 2, 0),
    ],
)
def test_what_can_be_known_is_exact(estimated, more, optimizer, kept):
    estimate, model = estimated(*more)
    one = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tensors = [*model.parameters(), *model.buffers()]
    assert estimate.weights == sum(tensor.nbytes for tensor in tensors)
    assert estimate.optimizer == optimizer * one and estimate.kept_gradients == kept * one
    assert (estimate.meta_pass == 0) == ("--baseline" in more)
    least = estimate.weights + estimate.optimizer + estimate.kept_gradients + estimate.image_features
    assert least + max(estimate.activations, estimate.meta_pass) <= estimate.total <= sum(vars(estimate).values())


def test_what_saves_memory_does_so_in_the_estimate(estimated):
    plain, _ = estimated()
    checkpointed, _ = estimated("--gradient_checkpointing")
    replayed, _ = estimated("--hypergradient", "jvp")
    longer, _ = estimated("--batch_size", "4")
    assert checkpointed.activations < plain.activations < longer.activations
    assert replayed.kept_gradients < plain.kept_gradients and replayed.total < plain.total


def test_an_estimate_loads_no_weights_and_draws_nothing(demo, tmp_path, monkeypatch):
    args = parse_arguments(flags(demo, tmp_path, "--reward_model", str(tiny_backbone())))
    before = torch.get_rng_state()
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", None)
    estimate_memory(args, read_run_data(args), CPU, "fp32")
    assert torch.equal(before, torch.get_rng_state())


def rest(total: int, weights: int = 0):
    return lambda: MemoryEstimate(weights, 0, 0, 0, 0, 0, 0, total)


def test_the_plan_takes_the_most_exact_way_that_fits():
    def never():
        raise AssertionError("there is plenty: nothing needs to be estimated")

    gigabyte = 10**9
    million = dict(trained=10**6, slots=8, optimizer="adamw")  # 40 MB
    assert plan_hypergradient(**million, free=gigabyte, forward_mode=True, rest=never)[0] == "window"
    assert plan_hypergradient(**million, free=10**8, forward_mode=True, rest=rest(40 * 10**6))[0] == "window"
    way, reason = plan_hypergradient(**million, free=10**8, forward_mode=True, rest=rest(60 * 10**6))
    assert way == "jvp" and "8 kept gradients take 0.04 GB of 0.10 GB" in reason
    # Weights that are there already do not count again.
    assert plan_hypergradient(**million, free=10**8, forward_mode=True, rest=rest(10**9, 10**9))[0] == "window"
    assert plan_hypergradient(**million, free=10**7, forward_mode=False, rest=rest(1))[0] == "finite_difference"
    assert has_forward_mode("sdpa", False) and has_forward_mode("eager", False)
    assert not has_forward_mode("flash_attention_2", False) and not has_forward_mode("sdpa", True)


def test_auto_looks_at_the_memory_and_a_resume_keeps_its_choice(demo, tmp_path, monkeypatch, capsys):
    run = flags(demo, tmp_path, "--reward_model", str(tiny_backbone()))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "free_memory", lambda device: 10**6)
        main(run)
    assert "hypergradient: jvp: 10 kept gradients take" in capsys.readouterr().out
    main([*run, "--iteration_num", "15", "--resume"])
    assert "hypergradient: jvp: as when the run was started" in capsys.readouterr().out
    assert load_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])["settings"]["planned_hypergradient"] == "jvp"
    with monkeypatch.context() as patch, pytest.raises(UserError, match="jvp: there is no forward mode through"):
        patch.setattr(run_module, "has_forward_mode", lambda attention, base_4bit: False)
        main([*run, "--hypergradient", "jvp"])
    main(run)
    assert "hypergradient: window: 10 kept gradients take" in capsys.readouterr().out


def test_a_weightless_model_is_the_model(tmp_path):
    plain = ProcessRewardModel.from_backbone(tiny_backbone(), lora_rank=2, freeze_vision=True)
    empty = ProcessRewardModel.from_backbone(tiny_backbone(), lora_rank=2, freeze_vision=True, device="meta")
    shapes = [{n: (p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()} for m in (plain, empty)]
    assert shapes[0] == shapes[1]
