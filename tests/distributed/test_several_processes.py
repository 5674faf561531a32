"""Several processes against one: the same losses, weights and parameters, however many processes there are and however
many a run resumes with."""

from functools import partial

import pyarrow.parquet
import pytest
import torch

from reweighting import main as command_module
from reweighting.distributed.collectives import rank
from reweighting.training import hypergradient_choice, signals
from reweighting.training.checkpoints import checkpoints, read_manifest
from tests.processes import Launched, command, left, parameters_of, run_processes
from tests.runs import StopAtStep, history
from tests.tiny_families import TEXT_FAMILIES, tiny_family

SGD, SHORT = ("--optimizer", "sgd", "--lr", "0.01"), ("--iteration_num", "15")
NET = ("--weights_for", "instance", "--instance_weights_form", "net")
DOUBLE = ("--max_grad_norm", "0.1", "--group_by_question", "--iteration_num", "20")


def differences(ours, theirs) -> tuple[float, float, float]:
    """The largest difference of two runs (folder, parameters) in losses, domain weights and parameters."""
    lines = list(zip(history(ours[0]), history(theirs[0]), strict=True))
    losses = max(abs(a[name] - b[name]) for a, b in lines for name in ("train_loss", "meta_loss") if name in a)
    weights = max(abs(a["weights"][domain] - b["weights"][domain]) for a, b in lines for domain in a["weights"])
    for a, b in lines:
        assert (a["step"], a["rows_seen"]) == (b["step"], b["rows_seen"])
    parameters = max(float((ours[1][name].detach() - theirs[1][name].detach()).abs().max()) for name in ours[1])
    return losses, weights, parameters


# AdamW's adjoint cancels numbers that are nearly equal: in float32 the weights of one process are as far from those in
# float64 as from several processes' (1e-3). SGD's does not. Differences of losses, which give the slopes of chains and
# labels, round more.
@pytest.mark.parametrize(
    ("world", "double", "files", "more", "of_weights"),
    [
        (2, False, "demo's", (), 5e-3),
        pytest.param(4, False, "demo's", (*SGD, "--max_grad_norm", "0.5"), 2e-6, marks=pytest.mark.slow),
        (2, False, "demo's", (*SGD, "--max_grad_norm", "0.5", "--weights_for", "both", *SHORT), 2e-5),
        pytest.param(2, False, "demo's", (*SGD, *NET, *SHORT), 2e-5, marks=pytest.mark.slow),
        (2, False, "demo's", (*SGD, "--max_grad_norm", "0.5", "--correct_labels", "interval", *SHORT), 2e-5),
        pytest.param(4, True, "demo's", DOUBLE, 1e-4, marks=pytest.mark.slow),
        (3, False, "some images", (*SGD, "--no_freeze_vision", "--iteration_num", "15"), 2e-6),
    ],
    ids=["adamw", "sgd", "instances", "network", "labels", "float64", "some-images"],
)
def test_several_processes_make_the_run_of_one(
    tiny, one, some_images, tmp_path, world, double, files, more, of_weights
):
    run, place = tmp_path / "run", tmp_path / "parameters"
    more = (*some_images, *more) if files == "some images" else more
    assert run_processes(world, parameters_of(tiny(run, *more), place, double)) == [0] * world
    parameters = left(place)
    losses, weights, worst = differences((run, parameters[0]), one(*more, double=double))
    print(f"{world} processes, {more}: losses {losses:.1e}, weights {weights:.1e}, parameters {worst:.1e}")
    exact = 1e-7 if double else 1e-6  # transformers' norms compute in float32 all the same
    assert losses < exact and worst < exact and weights < of_weights
    if "--correct_labels" in more:
        ours, theirs = (corrected_labels(folder) for folder in (run, one(*more, double=double)[0]))
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    for other in parameters[1:]:
        assert all(torch.equal(parameters[0][name], other[name]) for name in other), "to the bit"


def corrected_labels(folder) -> list[float]:
    return pyarrow.parquet.read_table(folder / "corrected_labels.parquet").column("corrected_label").to_pylist()


def test_a_run_goes_on_with_another_number_of_processes(tiny, one, tmp_path, monkeypatch):
    """Cut inside windows each time: 1 -> 2 -> 4 -> 1, by a signal that only the last process gets."""
    real = command_module.StopSignals
    run = tiny(tmp_path / "run", "--resume")
    for world, steps, reached in ((1, 3, 3), (2, 8, 11), (4, 7, 18)):
        with monkeypatch.context() as patch:
            stop = partial(lambda last, steps: StopAtStep(steps) if rank() == last else real(), world - 1, steps)
            patch.setattr(command_module, "StopSignals", stop)
            codes = run_processes(world, lambda: command(run)) if world > 1 else [stopped_here(run)]
        assert codes == [143] * world, codes
        assert read_manifest(checkpoints(tmp_path / "run" / "checkpoints")[-1]).step == reached
    parameters_of(run, tmp_path / "parameters")()
    losses, weights, worst = differences((tmp_path / "run", left(tmp_path / "parameters")[0]), one())
    assert losses < 1e-6 and worst < 1e-6 and weights < 5e-3, (losses, weights, worst)


def stopped_here(run: list[str]) -> int:
    with pytest.raises(signals.Stopped) as stopped:
        command_module.main(run)
    return 128 + stopped.value.signum


@pytest.mark.parametrize(
    ("worlds", "of_weights", "more"),
    [
        ((2, 3), 5e-3, ("--max_grad_norm", "0.1", "--no_freeze_vision")),
        ((3,), 2e-6, ("--lora_rank", "2", *SGD)),
        ((2, 3), 5e-3, ("--train", "head")),  # all of it on the first process
        pytest.param(
            *((2,), 2e-6, ("--lora_rank", "2", *SGD, "--no_freeze_projector", "--gradient_checkpointing")),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *((2,), 2e-6, ("--lora_rank", "2", *SGD, "--ignore_images", "--reward_model", "phi3")),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["whole-backbone", "lora", "head", "projector", "text"],
)
def test_a_sharded_model_makes_the_run_of_a_whole_one(
    tiny, one, some_images, tmp_path, monkeypatch, worlds, of_weights, more
):
    """Four or eight steps on parts of the parameters, cut inside windows, then on whole ones in one process."""
    more = ("--iteration_num", "15", *some_images, *(str(tiny_family(m)) if m in TEXT_FAMILIES else m for m in more))
    run = tiny(tmp_path / "run", *more, "--resume")
    sharded = parameters_of([*run, "--shard"], tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(command_module, "StopSignals", lambda: StopAtStep(4))
        for world in worlds:
            assert run_processes(world, lambda: stopped_work(sharded)) == [0] * world
    parameters_of(run, tmp_path / "parameters")()
    ours = tmp_path / "run", left(tmp_path / "parameters")[0]
    losses, weights, worst = differences(ours, one(*more))
    assert losses < 1e-6 and worst < 1e-6 and weights < of_weights, (losses, weights, worst)


def stopped_work(work) -> None:
    with pytest.raises(signals.Stopped):
        work()


def test_a_run_without_kept_gradients_cannot_go_on_in_parts(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(hypergradient_choice, "choose_method", lambda *_: ("jvp", "as it were"))
    run = tiny(tmp_path / "run", "--resume")
    command_module.main([*run, "--iteration_num", "5"])
    launched = Launched(2, lambda: command([*run, "--shard"]), tmp_path / "output")
    assert launched.exit_codes() == [2, 2]
    assert "--hypergradient jvp cannot move sharded parameters" in launched.printed()
    assert [line["step"] for line in history(tmp_path / "run")] == [5]
