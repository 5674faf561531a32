"""Several processes against one: the same losses, weights and parameters, however many there are and wherever they go
on from; and what happens to all when something happens to one."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from reweighting.distributed import rank0_output as rank0_output
from reweighting.distributed.collectives import rank
from reweighting.errors import UnreadableImage, UserError
from reweighting.main import main
from reweighting.modeling.tokenization import ChainTokenizer
from reweighting.training import engine, signals, validation
from reweighting.training import hypergradient_choice as hypergradient_plan
from reweighting.training.checkpoints import checkpoints, read_manifest
from tests.runs import ROOT, StopAtStep, flags, history, without_times
from tests.tiny import tiny_backbone
from tests.together import command, free_port, left, parameters_of, start, together, told

SGD = ("--optimizer", "sgd", "--lr", "0.01")


@pytest.fixture(scope="module")
def tiny(demo):
    """flags() of 50 steps with the tiny backbone; enough chains in a batch for four processes."""
    backbone = str(tiny_backbone())  # here, for all processes together

    def with_more(folder: Path, *more: str) -> list[str]:
        sizes = ["--iteration_num", "50", "--batch_size", "4", "--meta_batch_size", "12"]
        return flags(demo, folder, "--reward_model", backbone, *sizes, *more)

    return with_more


@pytest.fixture(scope="module")
def some_images(demo, tmp_path_factory):
    """Flags for the demo's rows without every second image, and with none at all in half of the domains: some batches
    have an image on one process only, and some on none."""
    folder, files = tmp_path_factory.mktemp("some-images"), []
    for name in ("train", "meta", "test"):
        rows, images = json.loads((demo / f"{name}.json").read_text()), {}
        for row in rows:
            number = images.setdefault(row["image_path"], len(images))
            if number % 2 or row.get("dataset", "") > "pie":
                row["image_path"] = None
        (folder / f"{name}.json").write_text(json.dumps(rows))
        files += [f"--{name.replace('test', 'validation')}_json_file", str(folder / f"{name}.json")]
    return (*files, "--image_root", str(demo))


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
    ("world", "double", "files", "more", "of_weights"),
    [
        (2, False, "demo's", (), 5e-3),
        (4, False, "demo's", (*SGD, "--max_grad_norm", "0.5"), 2e-6),
        (4, True, "demo's", ("--max_grad_norm", "0.1", "--group_by_question", "--iteration_num", "20"), 1e-4),
        (3, False, "some images", (*SGD, "--no_freeze_vision", "--iteration_num", "15"), 2e-6),
    ],
    ids=["adamw", "sgd", "float64", "some-images"],
)
def test_several_processes_make_the_run_of_one(
    tiny, one, some_images, tmp_path, world, double, files, more, of_weights
):
    run, place = tmp_path / "run", tmp_path / "parameters"
    more = (*some_images, *more) if files == "some images" else more
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
        assert read_manifest(checkpoints(tmp_path / "run" / "checkpoints")[-1]).step == reached
    parameters_of(run, tmp_path / "parameters")()
    losses, weights, worst = differences((tmp_path / "run", left(tmp_path / "parameters")[0]), one())
    assert losses < 1e-6 and worst < 1e-6 and weights < 5e-3, (losses, weights, worst)


def stopped_here(run: list[str]) -> int:
    with pytest.raises(signals.Stopped) as stopped:
        main(run)
    return 128 + stopped.value.signum


@pytest.mark.parametrize(
    ("worlds", "of_weights", "more"),
    [
        ((2, 3), 5e-3, ("--max_grad_norm", "0.1", "--no_freeze_vision")),
        ((3,), 2e-6, ("--lora_rank", "2", *SGD)),
        ((2, 3), 5e-3, ("--train", "head")),  # all of it on the first process
        ((2,), 2e-6, ("--lora_rank", "2", *SGD, "--no_freeze_projector", "--gradient_checkpointing")),
    ],
    ids=["whole-backbone", "lora", "head", "projector"],
)
def test_a_sharded_model_makes_the_run_of_a_whole_one(
    tiny, one, some_images, tmp_path, monkeypatch, worlds, of_weights, more
):
    """Four or eight steps on parts of the parameters, cut inside windows, then on whole ones in one process."""
    more = ("--iteration_num", "15", *some_images, *more)
    run = tiny(tmp_path / "run", *more, "--resume")
    sharded = parameters_of([*run, "--shard"], tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(signals, "StopSignals", lambda: StopAtStep(4))
        for world in worlds:
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
    codes, said = told(2, lambda: command(tiny(tmp_path / "run")), tmp_path / "said")
    assert codes == [2, 2]
    assert said.count("this disk has gone; tried 4 times. The run is saved at step 4: --resume") == 1
    assert read_manifest(checkpoints(tmp_path / "run" / "checkpoints")[-1]).step == 4


@pytest.mark.parametrize("more", [(), ("--shard",)], ids=["whole", "sharded"])
def test_a_validation_image_that_one_process_cannot_read(tiny, demo, tmp_path, monkeypatch, more):
    """Whole, it is tried again; for good, all end with what there is. Sharded, the others wait inside the model."""
    score, calls = validation.score_candidates, []

    def score_or_not(*args):
        calls.append(args)
        if rank() == 1 and len(calls) != 3:
            raise UnreadableImage("test.json: row 3: this disk has gone")
        return score(*args)

    monkeypatch.setattr(validation, "score_candidates", score_or_not)
    monkeypatch.setattr(engine, "FIRST_PAUSE", 0.0)
    run = tiny(tmp_path / "run", "--validation_json_file", str(demo / "test.json"), *more)
    codes, said = told(2, lambda: command(run), tmp_path / "said")
    assert codes == [2, 2] and said.count("error: ") == 1, said
    scores = [read_manifest(place).score for place in checkpoints(tmp_path / "run" / "checkpoints")]
    if more:
        assert "error: process 1 of 2 on " in said and "row 3: this disk has gone" in said and scores == []
    else:
        assert "row 3: this disk has gone; tried 4 times. The run is saved at step 10: --resume goes on" in said
        assert scores[0] is not None and scores[1] is None


def test_a_run_without_kept_gradients_cannot_go_on_in_parts(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(hypergradient_plan, "plan_hypergradient", lambda *_: ("jvp", "as it were"))
    run = tiny(tmp_path / "run", "--resume")
    main([*run, "--iteration_num", "5"])
    codes, said = told(2, lambda: command([*run, "--shard"]), tmp_path / "said")
    assert codes == [2, 2] and "--hypergradient jvp cannot move parameters that are cut into parts" in said
    assert [line["step"] for line in history(tmp_path / "run")] == [5]


def test_a_main_process_that_ends_inside_a_save_leaves_the_checkpoint_before(tiny, one, tmp_path, monkeypatch):
    """The other one is killed meanwhile, and the main one's watch ends it at once."""
    save, saver = torch.save, engine.ReweightingEngine.model_saver

    def half(state, file, **options) -> None:
        if isinstance(state, dict) and state["step"] == 10:
            file.write(b"half of it")
            time.sleep(60)
        save(state, file, **options)

    def die(self):
        if rank() == 1 and self.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return saver(self)

    more = (*SGD, "--iteration_num", "15")
    run = tiny(tmp_path / "run", *more, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(rank0_output, "SILENCE", 1.0)
        patch.setattr(torch, "save", half)
        patch.setattr(engine.ReweightingEngine, "model_saver", die)
        codes, said = told(2, lambda: command(run), tmp_path / "said")
    assert codes == [2, -signal.SIGKILL] and "process 1 of 2 has not been heard of" in said
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [".step-00000010.writing", "step-00000005"]
    parameters_of(run, tmp_path / "parameters")()
    differing = differences((tmp_path / "run", left(tmp_path / "parameters")[0]), one(*more))
    assert max(differing) < 2e-6
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


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
        monkeypatch.setattr(rank0_output, "SILENCE", 2.0)
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
        (2, ("--shard", "--lora_rank", "2", "--no_freeze_projector"), "--shard with a trained projector beside"),
        (1, ("--shard",), "--shard does nothing in one process"),
    ],
)
def test_what_several_processes_cannot_do_is_said_once(tiny, tmp_path, world, more, message):
    if world == 1:
        with pytest.raises(UserError, match=message):
            main(tiny(tmp_path / "run", *more))
        return
    started = start(world, lambda: command(tiny(tmp_path / "run", *more)), tmp_path / "said")
    started[0].join(60)
    for process in started[1:]:
        process.kill()
    said = (tmp_path / "said").read_text()
    assert started[0].exitcode == 2 and said.count("error: ") == 1 and message in said


def test_another_process_speaks_where_the_main_one_has_been_killed(tmp_path):
    """The processes' store is torchrun's, and outlives the main one."""
    address = "localhost", free_port(), None
    store = torch.distributed.TCPStore(*address, True, wait_for_workers=False)

    def work() -> None:
        number = int(os.environ["RANK"])
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        watch = rank0_output.watch(torch.distributed.TCPStore(*address, False, wait_for_workers=False), number, 3)
        if number == 1:
            watch.tell("out of luck")
        time.sleep(30)

    codes, said = told(3, work, tmp_path / "said")
    assert codes == [-signal.SIGKILL, 2, 2] and said.count("error: out of luck\n") == 1, said
    assert store.check(["told"])


@pytest.mark.parametrize(
    ("launcher", "options", "blow", "words"),
    [
        (
            "torch.distributed.run",
            ("--nproc_per_node=2", "--master_port"),
            "SIGKILL",
            "another of the 2 processes has ended without a word",
        ),
        (
            "accelerate.commands.launch",
            ("--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port"),
            "SIGTERM",
            "stopped and saved at step",
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers_and_a_signal_to_one_process(tiny, one, tmp_path, launcher, options, blow, words):
    """The real command: a signal to any of its processes ends it with a word, and one process goes on from there."""
    script, run = str(ROOT / "reweighting" / "main.py"), tiny(tmp_path / "run", "--resume")
    start = [sys.executable, "-m", launcher, *options, str(free_port()), script, *run]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = tmp_path / "run" / "history.jsonl"
    while process.poll() is None and not (lines.exists() and lines.read_text()):
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), getattr(signal, blow))
    said = process.communicate(timeout=60)[0]
    line = f"error: {words}" if blow == "SIGKILL" else words
    assert process.returncode == 1 and said.count(f"\n{line}") == 1, said
    assert f"traceback : {words}" in said, "torchrun does not repeat it"
    if blow == "SIGKILL":  # what is left then, see above
        return
    main(run)
    assert [line["step"] for line in without_times(tmp_path / "run")] == list(range(5, 55, 5))
    assert max(abs(a["train_loss"] - b["train_loss"]) for a, b in zip(history(tmp_path / "run"), history(one()[0]),
                                                                    strict=True)) < 1e-6  # fmt: skip


def test_the_slurm_script_is_sound():
    assert subprocess.run(["bash", "-n", str(ROOT / "examples" / "slurm.sh")]).returncode == 0
