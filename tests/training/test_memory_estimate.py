"""The memory estimate, exact where sizes are known, and what is planned with it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from reweighting.config.training import ModelConfig, TrainingConfig
from reweighting.data.chains import Chain, candidate_chains
from reweighting.errors import UserError
from reweighting.main import main
from reweighting.modeling.collate import collate
from reweighting.modeling.fake_tensors import on_shapes
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.training import hypergradient_choice
from reweighting.training.build import load_backbone
from reweighting.training.checkpoints import checkpoints, load_checkpoint
from reweighting.training.fake_tensor_memory import LiveMemory, step_memory
from reweighting.training.free_memory import CGROUP_FILES, _free_in_cgroups, free_memory
from reweighting.training.hypergradient_choice import check_method, choose_method, estimate_memory, has_forward_mode
from reweighting.training.memory_estimate import (
    NF4,
    MemoryScenario,
    _lower_loss,
    _tensors,
    estimate,
    longest,
    weight_bytes,
)
from reweighting.training.run_data import read_run_data
from tests.runs import flags
from tests.tiny import draw_cells, tiny_backbone
from tests.tiny_families import TEXT_FAMILIES, TINY_FAMILIES, tiny_family

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


TRAIN_MODES = {
    "full": {"attn_implementation": "eager"},
    "lora": {"lora_rank": 2},
    "frozen-vision": {"freeze_vision": True, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("mode", TRAIN_MODES)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_pass_on_shapes_takes_what_the_real_one_takes(family, mode, tmp_path):
    """To the byte, in every family: every tensor of a real forward and backward pass counted, and those on shapes."""
    images = () if family in TEXT_FAMILIES else (draw_cells(tmp_path / "cells.png"),)
    steps = ("Step 1: two in the first row", "Step 2: so 3 in all")
    chains = [Chain("How many red cells?", steps[:n], images * n, targets=(0.9, 0.1)[:n]) for n in (2, 2, 1)]

    def parts(device: str):
        model = ProcessRewardModel.from_backbone(tiny_family(family), device=device, **TRAIN_MODES[mode]).train()
        batch = collate([model.chain_tokenizer.encode(chain) for chain in chains])  # one is padded
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        known = [*model.parameters(), *model.buffers(), *_tensors(batch)]
        return partial(_lower_loss, model, batch, "fp32", "bce" if mode == "lora" else "mse"), trained, known

    loss, trained, known = parts("cpu")
    with LiveMemory(known) as live:
        value = loss()
        saved = live.now
        grads = torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True)
        del value, grads
    assert step_memory(*parts("meta")) == (saved, live.peak)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_4_bits_are_the_language_models_linear_layers(family):
    plain, small = (
        ProcessRewardModel.from_backbone(tiny_family(family), train="lora", device="meta", load_in_4bit=load_in_4bit)
        for load_in_4bit in (False, True)
    )
    adapted = [p.numel() for name, p in plain.base.named_parameters() if name.endswith("base_layer.weight")]
    assert len(adapted) == 2 * (4 if family == "phi3" else 7)  # whose layers are fused
    assert weight_bytes(plain) - weight_bytes(small) == sum(int(count * (4 - NF4)) for count in adapted)


def test_parts_of_a_model_take_their_part():
    model = ProcessRewardModel.from_backbone(tiny_backbone(), device="meta")
    batch = collate([model.chain_tokenizer.encode(Chain("How many?", ("Step 1: two",), targets=(0.9,)))] * 16)
    whole, two = (estimate(model, batch, batch, MemoryScenario(processes=2, sharded=cut)) for cut in (False, True))
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert 2 * (two.weights - buffers) == whole.weights - buffers and two.optimizer * 2 == whole.optimizer
    assert whole.kept == (5 + 5 + 2) * whole.optimizer // 2, "each micro-batch's, the sums, two moments"
    assert two.kept == (5 + 2) * two.optimizer // 2 and two.activations == whole.activations
    whole, two = (
        estimate(model, batch, None, MemoryScenario(hypergradient=None, processes=2, sharded=cut))
        for cut in (False, True)
    )
    step = [one.total - one.weights - one.optimizer - one.image_features for one in (whole, two)]
    weights = whole.weights - buffers  # of two layers and what belongs to none: all of it is gathered, as are gradients
    assert step[1] - 2 * weights < step[0] < step[1] - weights


def test_gradients_that_go_elsewhere_are_counted_until_then():
    with torch.device("meta"):
        layers = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)])
    layers, x, one = on_shapes(layers), torch.randn(2, 64), 4 * 64 * 64
    (_, whole), (_, cut) = (
        step_memory(lambda: layers(x).sum(), list(layers.parameters()), [*layers.parameters(), x], parts)
        for parts in (1, 4)
    )
    assert 8 * one < whole < 8.5 * one and (1 + 8 / 4) * one < cut < 3.5 * one
    assert all(parameter.grad is None for parameter in layers.parameters())


@pytest.fixture
def estimated(demo, tmp_path):
    """(flags) -> the estimate of a run on the demo, the model it is for, its arguments."""

    def estimate(*more):
        config = TrainingConfig.parse(flags(demo, tmp_path, "--reward_model", str(tiny_backbone()), *more))
        model = load_backbone(config, CPU, "fp32")
        return estimate_memory(config, read_run_data(config), CPU, "fp32"), model

    return estimate


@pytest.mark.parametrize(
    ("more", "optimizer", "kept"),
    [
        ((), 2, 5 * 2 + 2),
        (("--lora_rank", "2"), 2, 5 * 2 + 2),
        (("--no_freeze_vision", "--gradient_accumulation", "3"), 2, 5 * 3 + 2),
        (("--optimizer", "sgd"), 1, 5 * 2),
        (("--baseline",), 2, 0),
    ],
)
def test_what_can_be_known_is_exact(estimated, more, optimizer, kept):
    estimate, model = estimated(*more)
    one = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tensors = [*model.parameters(), *model.buffers()]
    assert estimate.weights == sum(tensor.nbytes for tensor in tensors)
    assert estimate.optimizer == optimizer * one and estimate.kept == kept * one
    assert (estimate.meta_pass == 0) == ("--baseline" in more)
    least = estimate.weights + estimate.optimizer + estimate.kept + estimate.image_features
    assert least + max(estimate.activations, estimate.meta_pass) <= estimate.total
    assert estimate.total < 1.1 * (sum(vars(estimate).values()) - estimate.total)


def test_step_states_take_what_is_estimated(demo, tmp_path):
    """Those of all chains, and the pass that computes one chain's, to the byte."""
    more = ("--reward_model", str(tiny_backbone()), "--train", "head")
    more += ("--validation_json_file", str(demo / "test.json"))
    config = TrainingConfig.parse(flags(demo, tmp_path, *more))
    data, model = read_run_data(config), load_backbone(config, CPU, "fp32")
    estimate = estimate_memory(config, data, CPU, "fp32")
    candidates = [chain for row in data.validation for chain in candidate_chains(row)]
    for chain in (*data.train, *data.meta, *candidates):
        model.step_states.of(chain)
    (chain,) = longest(model, [*data.train, *data.meta], 1)
    known = [*model.parameters(), *model.buffers(), *_tensors(model.chain_tokenizer.encode(chain))]
    with LiveMemory(known) as live:
        model.step_states.compute(chain)
    kept = sum(states.nbytes for states in model.step_states._known.values())
    assert estimate.step_states == kept + live.peak
    lasting = estimate.weights + estimate.optimizer + estimate.kept + estimate.image_features
    assert estimate.total == lasting + kept + live.peak


@pytest.mark.slow
def test_what_saves_memory_does_so_in_the_estimate(estimated):
    plain, _ = estimated()
    checkpointed, _ = estimated("--gradient_checkpointing")
    replayed, _ = estimated("--hypergradient", "jvp")
    longer, _ = estimated("--batch_size", "4")
    assert checkpointed.activations < plain.activations < longer.activations
    assert replayed.kept < plain.kept and replayed.total < plain.total


def test_an_estimate_is_of_what_is_drawn(estimated, demo, tmp_path):
    """No more meta answers than there are; images, whatever the longest row has."""
    all_of_them, _ = estimated("--meta_batch_size", "20")
    more, _ = estimated("--meta_batch_size", "64")
    assert more == all_of_them
    config = TrainingConfig.parse(flags(demo, tmp_path, "--reward_model", str(tiny_backbone())))
    data = read_run_data(config)
    text = Chain("How many words are there? " * 20, ("Step 1: one hundred",), targets=(0.5,))
    with_text = estimate_memory(config, replace(data, train=[*data.train, text]), CPU, "fp32")
    without = estimate_memory(config, data, CPU, "fp32")
    assert with_text.image_features > without.image_features
    many = data.train * 20  # of which a sample is looked at
    many[1] = replace(many[1], steps=("Step 1: a",), targets=(0.5,), images=many[1].images * 99)  # many tokens, no text
    assert many[1].images and estimate_memory(config, replace(data, train=many), CPU, "fp32").activations > (
        1.5 * without.activations
    )


def test_an_estimate_loads_no_weights_and_draws_nothing(demo, tmp_path, monkeypatch):
    config = TrainingConfig.parse(flags(demo, tmp_path, "--reward_model", str(tiny_backbone())))
    before = torch.get_rng_state()
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", None)
    estimate_memory(config, read_run_data(config), CPU, "fp32")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("controller", ["", "memory"])
def test_a_control_group_limits_the_memory(tmp_path, controller):
    """A job's own group has no limit, the one around it has; the cache of files counts as free."""
    limit, used, cache = CGROUP_FILES[controller]
    job = tmp_path / controller / "slurm" / "job_7" / "step_0"
    job.mkdir(parents=True)
    for folder, most in ((job, "max"), (job.parent, "1000"), (job.parents[1], "5000")):
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("400\n")
        (folder / "memory.stat").write_text(f"anon 300\n{cache} 100\n")
    own = tmp_path / "own"
    own.write_text(f"12:cpuset:/elsewhere\n3:{controller}:/slurm/job_7/step_0\n")
    assert min(_free_in_cgroups(tmp_path, own)) == 1000 - 300
    assert min(_free_in_cgroups(tmp_path, tmp_path / "missing")) == float("inf")


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    alone = free_memory(CPU)
    for name, value in {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert 0.2 * alone < free_memory(CPU) < 0.3 * alone


def test_auto_takes_unrolled_while_half_of_the_free_memory_holds_it(demo, tmp_path):
    def choose(free: int, *more: str, precision: str = "fp32"):
        config = TrainingConfig.parse(flags(demo, tmp_path, "--reward_model", str(tiny_backbone()), *more))
        return choose_method(config, data, model, free, precision)

    config = TrainingConfig.parse(flags(demo, tmp_path, "--reward_model", str(tiny_backbone())))
    data, model = read_run_data(config), load_backbone(config, torch.device("meta"), "fp32")
    vector = 4 * sum(param.numel() for param in model.parameters() if param.requires_grad)
    kept = vector * (5 * 2 + 2)  # gradients of five steps of two micro-batches, and AdamW's moments
    assert choose(2 * kept)[0] == "unrolled" and choose(2 * kept - 1)[0] == "finite_difference"
    assert choose(2 * kept - 2 * 2 * vector, "--optimizer", "sgd")[0] == "unrolled"
    assert choose(2 * kept - 1, precision="bf16")[0] == choose(0, "--weights_for", "both", precision="bf16")[0] == "jvp"
    method, reason = choose(2 * kept - 1, "--attention", "flash_attention_2", precision="bf16")
    assert method == "finite_difference" and "no forward mode" in reason
    assert choose(0, "--weights_for", "both")[0] == "finite_difference"
    assert choose(0, "--hypergradient", "darts") == ("darts", "as asked for")
    assert choose(0, "--shard")[0] == "unrolled"


def test_forward_mode_needs_plain_arithmetic():
    config = ModelConfig()
    assert has_forward_mode(config) and has_forward_mode(replace(config, attention="eager"))
    assert not has_forward_mode(replace(config, attention="flash_attention_2"))
    assert not has_forward_mode(replace(config, load_in_4bit=True))


@pytest.mark.parametrize("kernels", [("--load_in_4bit",), ("--attention", "flash_attention_2")])
def test_a_head_that_is_trained_alone_has_forward_mode_whatever_the_backbone(demo, tmp_path, kernels):
    """It reads remembered states, so that no derivative goes through the backbone."""

    def config(train: str, *more: str) -> TrainingConfig:
        return TrainingConfig.parse(flags(demo, tmp_path, "--train", train, *kernels, *more))

    check_method(config("head"), "jvp")
    assert choose_method(config("head", "--weights_for", "instance"), None, None, 0, "bf16")[0] == "jvp"
    with pytest.raises(UserError, match="jvp: there is no forward mode.*use finite_difference, or --train head"):
        check_method(config("lora"), "jvp")


def test_auto_looks_at_the_memory_and_a_resume_keeps_its_choice(demo, tmp_path, monkeypatch, capsys):
    run = flags(demo, tmp_path, "--reward_model", str(tiny_backbone()))
    with monkeypatch.context() as patch:
        patch.setattr(hypergradient_choice, "free_memory", lambda device: 10**6)
        main(run)
    assert "hypergradient: finite_difference: kept gradients take" in capsys.readouterr().out
    main([*run, "--iteration_num", "15", "--resume"])
    assert "hypergradient: finite_difference: as when the run was started" in capsys.readouterr().out
    settings = load_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])["settings"]
    assert settings["planned_hypergradient"] == "finite_difference"
    with monkeypatch.context() as patch, pytest.raises(UserError, match="jvp: there is no forward mode through"):
        patch.setattr(hypergradient_choice, "has_forward_mode", lambda config: False)
        main([*run, "--hypergradient", "jvp"])
    main(run)
    assert "hypergradient: unrolled: kept gradients take" in capsys.readouterr().out


def test_a_weightless_model_is_the_model():
    plain = ProcessRewardModel.from_backbone(tiny_backbone(), lora_rank=2, freeze_vision=True)
    empty = ProcessRewardModel.from_backbone(tiny_backbone(), lora_rank=2, freeze_vision=True, device="meta")
    shapes = [{n: (p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()} for m in (plain, empty)]
    assert shapes[0] == shapes[1]
