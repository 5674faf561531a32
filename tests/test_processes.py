"""Several processes against one: the same losses, weights and parameters, however many there are and wherever they go
on from; and what happens to all when something happens to one."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from reweighting import engine, one_voice, signals
from reweighting.batches import ChainTokenizer
from reweighting.checkpoints import checkpoints, read_manifest
from reweighting.errors import UnreadableImage, UserError
from reweighting.main import main
from reweighting.processes import rank
from tests.runs import ROOT, StopAtStep, flags, history, without_times
from tests.tiny import tiny_backbone
from tests.together import command, free_port, left, parameters_of, start, together


@pytest.fixture(scope="module")
def tiny(demo):
    """flags() of 50 steps with the tiny backbone; enough chains in a batch for four processes."""

    def with_more(folder: Path, *more: str) -> list[str]:
        sizes = ["--iteration_num", "50", "--batch_size", "4", "--meta_batch_size", "12"]
        return flags(demo, folder, "--reward_model", str(tiny_backbone()), *sizes, *more)

    return with_more


@pytest.fixture(scope="module")
def one(tiny, demo, tmp_path_factory):
    """The run of one process: its folder, and its parameters at the end, for given flags; each made once."""
    made = {}

    def run(*more: str, double: bool = False):
        if (more, double) not in made:
            folder = tmp_path_factory.mktemp("one")
            parameters_of(tiny(folder / "run", *more), folder / "parameters", double)()
            made[more, double] = folder / "run", left(folder / "parameters")[0]
        return made[more, double]

    return run


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
# float64 as from several processes' (1e-3). SGD's does not.
@pytest.mark.parametrize(
    ("world", "double", "more", "of_weights"),
    [
        (2, False, (), 5e-3),
        (4, False, ("--optimizer", "sgd", "--lr", "0.01", "--max_grad_norm", "0.5"), 2e-6),
        (4, True, ("--max_grad_norm", "0.1", "--questions_together", "--iteration_num", "20"), 1e-4),
    ],
    ids=["adamw", "sgd", "float64"],
)
def test_several_processes_make_the_run_of_one(tiny, one, tmp_path, world, double, more, of_weights):
    run, place = tmp_path / "run", tmp_path / "parameters"
    assert together(world, parameters_of(tiny(run, *more), place, double)) == [0] * world
    parameters = left(place)
    losses, weights, worst = differences((run, parameters[0]), one(*more, double=double))
    print(f"{world} processes, {more}: losses {losses:.1e}, weights {weights:.1e}, parameters {worst:.1e}")
    exact = 1e-7 if double else 1e-6  # transformers' norms compute in float32 all the same
    assert losses < exact and worst < exact and weights < of_weights
    for other in parameters[1:]:
        assert all(torch.equal(parameters[0][name], other[name]) for name in other), "to the bit"


def test_a_run_goes_on_with_another_number_of_processes(tiny, one, tmp_path, monkeypatch):
    """Cut inside windows each time: 1 -> 2 -> 4 -> 1, by a signal that only the last process gets."""
    asked = signals.StopSignals
    run = tiny(tmp_path / "run", "--resume")
    for world, steps, reached in ((1, 3, 3), (2, 8, 11), (4, 7, 18)):
        with monkeypatch.context() as patch:
            told = partial(lambda last, steps: StopAtStep(steps) if rank() == last else asked(), world - 1, steps)
            patch.setattr(signals, "StopSignals", told)
            codes = together(world, lambda: command(run)) if world > 1 else [stopped_here(run)]
        assert codes == [143] * world, codes
        assert read_manifest(checkpoints(tmp_path / "run" / "checkpoints")[-1])["step"] == reached
    parameters_of(run, tmp_path / "parameters")()
    losses, weights, worst = differences((tmp_path / "run", left(tmp_path / "parameters")[0]), one())
    assert losses < 1e-6 and worst < 1e-6 and weights < 5e-3, (losses, weights, worst)


def stopped_here(run: list[str]) -> int:
    with pytest.raises(signals.Stopped) as stopped:
        main(run)
    return 128 + stopped.value.signum


@pytest.mark.parametrize(
    ("world", "of_weights", "more"),
    [
        (2, 5e-3, ("--max_grad_norm", "0.1", "--no_freeze_vision")),
        (3, 2e-6, ("--lora_rank", "2", "--optimizer", "sgd", "--lr", "0.01")),
    ],
    ids=["whole-backbone", "lora"],
)
def test_a_sharded_model_makes_the_run_of_a_whole_one(tiny, one, demo, tmp_path, monkeypatch, world, of_weights, more):
    """Eight steps on parts of the parameters, cut inside a window, then on whole ones in one process."""
    more = ("--iteration_num", "15", "--validation_json_file", str(demo / "test.json"), *more)
    run = tiny(tmp_path / "run", *more, "--resume")
    sharded = parameters_of([*run, "--shard"], tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(signals, "StopSignals", lambda: StopAtStep(8))
        assert together(world, lambda: stopped_work(sharded)) == [0] * world
    parameters_of(run, tmp_path / "parameters")()
    ours = tmp_path / "run", left(tmp_path / "parameters")[0]
    losses, weights, worst = differences(ours, one(*more))
    assert losses < 1e-6 and worst < 1e-6 and weights < of_weights, (losses, weights, worst)


def stopped_work(work) -> None:
    with pytest.raises(signals.Stopped):
        work()


def test_an_image_that_one_process_cannot_read_ends_all_with_what_there_is(tiny, tmp_path, monkeypatch):
    encode, steps = ChainTokenizer.encode, []

    def encode_or_not(self, chain, pixels=None):
        steps.append(chain)
        if rank() == 1 and len(steps) > 20:
            raise UnreadableImage("train.json: row 3: this disk has gone")
        return encode(self, chain, pixels)

    monkeypatch.setattr(ChainTokenizer, "encode", encode_or_not)
    monkeypatch.setattr(engine, "FIRST_PAUSE", 0.0)
    said = tmp_path / "said"
    started = start(2, lambda: command(tiny(tmp_path / "run")), said)
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [2, 2]
    assert said.read_text().count("this disk has gone; tried 4 times. The run is saved at step 4: --resume") == 1
    assert read_manifest(checkpoints(tmp_path / "run" / "checkpoints")[-1])["step"] == 4


@pytest.mark.parametrize("blow", ["killed", "frozen", "failed"])
def test_what_ends_one_process_ends_all(tiny, tmp_path, monkeypatch, blow):
    def strike(self) -> None:
        if rank() == 1 and self.global_step == 3:
            if blow == "failed":
                raise UserError("out of luck")
            os.kill(os.getpid(), signal.SIGKILL if blow == "killed" else signal.SIGSTOP)
        return prepare(self)

    prepare = engine.ReweightingEngine._prepare_step
    monkeypatch.setattr(engine.ReweightingEngine, "_prepare_step", strike)
    if blow == "frozen":
        monkeypatch.setattr(one_voice, "SILENCE", 2.0)
    said, began = tmp_path / "said", time.monotonic()
    main_one, other = start(2, lambda: command(tiny(tmp_path / "run")), said)
    main_one.join(60)
    other.kill()
    assert main_one.exitcode == 2 and time.monotonic() - began < 40
    words = {
        "killed": "another of the 2 processes has ended without a word",
        "frozen": "process 1 of 2 has not been heard of for 2 s; --resume goes on from the last checkpoint",
        "failed": "out of luck",
    }
    assert words[blow] in said.read_text(), said.read_text()


@pytest.mark.parametrize(
    ("world", "more", "message"),
    [
        (3, ("--batch_size", "2"), "--batch_size 2: 3 processes share the chains of a batch, which can be 2: use a"),
        (3, ("--meta_batch_size", "2"), "--meta_batch_size 2: 3 processes share"),
        (2, ("--hypergradient", "darts"), "--hypergradient darts: Betty's own work in one process only"),
        (2, ("--device", "cpu:1"), "--device cpu:1: several processes compute on cuda"),
        (1, ("--shard",), "--shard does nothing in one process"),
    ],
)
def test_what_several_processes_cannot_do_is_said_once(tiny, tmp_path, world, more, message):
    said = tmp_path / "said"
    if world == 1:
        with pytest.raises(UserError, match=message):
            main(tiny(tmp_path / "run", *more))
        return
    started = start(world, lambda: command(tiny(tmp_path / "run", *more)), said)
    started[0].join(60)
    for process in started[1:]:
        process.kill()
    assert started[0].exitcode == 2 and said.read_text().count("error: ") == 1 and message in said.read_text()


def test_torchrun_and_a_signal_to_one_process(tiny, one, tmp_path):
    """The real command: a signal to any of its processes saves and ends it, and one process goes on from there."""
    script, run = str(ROOT / "reweighting" / "main.py"), tiny(tmp_path / "run", "--resume")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    process = subprocess.Popen([*torchrun, script, *run], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = tmp_path / "run" / "history.jsonl"
    while process.poll() is None and not (lines.exists() and lines.read_text()):
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and said.count("stopped and saved at step") == 1, said
    main(run)
    assert [line["step"] for line in without_times(tmp_path / "run")] == list(range(5, 55, 5))
    assert max(abs(a["train_loss"] - b["train_loss"]) for a, b in zip(history(tmp_path / "run"), history(one()[0]),
                                                                    strict=True)) < 1e-6  # fmt: skip


def test_the_slurm_script_is_sound():
    assert subprocess.run(["bash", "-n", str(ROOT / "examples" / "slurm.sh")]).returncode == 0
