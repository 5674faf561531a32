"""What happens to all processes when something happens to one: one error says what, and nothing saved is lost."""

import os
import signal
import socket
import time

import pytest
import torch

from reweighting.distributed import rank0_output
from reweighting.distributed.collectives import rank
from reweighting.distributed.rank0_output import dist_env
from reweighting.errors import UnreadableImage, UserError
from reweighting.main import main
from reweighting.modeling.tokenization import ChainTokenizer
from reweighting.training import engine, validation
from reweighting.training.checkpoints import checkpoints, read_manifest
from tests.distributed.test_several_processes import SGD, differences
from tests.processes import Launched, command, left, parameters_of
from tests.runs import history

HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """No launcher ends the processes of these tests, so that they wait in vain."""
    monkeypatch.setattr(rank0_output, "RANK0_FIRST", 3.0)
    monkeypatch.setattr(rank0_output, "PEER_FIRST", 1.0)


def test_an_image_that_one_process_cannot_read_ends_all_and_saves(tiny, tmp_path, monkeypatch):
    encode, steps = ChainTokenizer.encode, []

    def encode_or_not(self, chain, images=None):
        steps.append(chain)
        if rank() == 1 and len(steps) > 20:
            raise UnreadableImage("train.json: row 3: this disk has gone")
        return encode(self, chain, images)

    monkeypatch.setattr(ChainTokenizer, "encode", encode_or_not)
    monkeypatch.setattr(engine, "FIRST_PAUSE", 0.0)
    launched = Launched(2, lambda: command(tiny(tmp_path / "run")), tmp_path / "output")
    assert launched.exit_codes() == [2, 2]
    assert launched.printed().count("this disk has gone; tried 4 times. The run is saved at step 4: --resume") == 1
    assert launched.printed().count("error: ") == 1
    assert read_manifest(checkpoints(tmp_path / "run" / "checkpoints")[-1]).step == 4


@pytest.mark.parametrize("more", [(), ("--shard",)], ids=["whole", "sharded"])
def test_a_validation_image_that_one_process_cannot_read(tiny, demo, tmp_path, monkeypatch, more):
    """Whole, it is tried again, and at the last failure all save and end. Sharded, the others wait inside the model."""
    score, calls = validation.score_candidates, []

    def score_or_not(*args):
        calls.append(args)
        if rank() == 1 and len(calls) != 3:
            raise UnreadableImage("test.json: row 3: this disk has gone")
        return score(*args)

    monkeypatch.setattr(validation, "score_candidates", score_or_not)
    monkeypatch.setattr(engine, "FIRST_PAUSE", 0.0)
    run = tiny(tmp_path / "run", "--validation_json_file", str(demo / "test.json"), *more)
    launched = Launched(2, lambda: command(run), tmp_path / "output")
    codes, printed = launched.exit_codes(), launched.printed()
    assert codes == [2, 2] and printed.count("error: ") == 1, printed
    scores = [read_manifest(place).score for place in checkpoints(tmp_path / "run" / "checkpoints")]
    if more:
        assert f"error: process 1 of 2 on {HOST}: " in printed and "row 3: this disk has gone" in printed
        assert scores == []
    else:
        assert "row 3: this disk has gone; tried 4 times. The run is saved at step 10: --resume" in printed
        assert scores[0] is not None and scores[1] is None


def test_process_0_killed_inside_a_save_leaves_the_checkpoint_before(tiny, one, tmp_path, monkeypatch):
    save = torch.save

    def half(state, file, **options) -> None:
        if isinstance(state, dict) and state["step"] == 10:
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file, **options)

    more = (*SGD, "--iteration_num", "15")
    run = tiny(tmp_path / "run", *more, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        launched = Launched(2, lambda: command(run), tmp_path / "output")
        assert launched.exit_codes() == [-signal.SIGKILL, 2]
    assert launched.printed().count("error: another of the 2 processes has ended") == 1
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(names) == 2 and names[0].startswith(".tmp-") and names[1] == "step-00000005", names
    parameters_of(run, tmp_path / "parameters")()
    differing = differences((tmp_path / "run", left(tmp_path / "parameters")[0]), one(*more))
    assert max(differing) < 2e-6
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("what", "who", "message"),
    [
        ("killed", 0, "another of the 3 processes has ended ("),
        ("killed", 1, "another of the 3 processes has ended ("),
        pytest.param(
            *("frozen", 1, "another of the 3 processes does not answer within --distributed_timeout ("),
            marks=pytest.mark.slow,
        ),
        ("refused", 0, "out of luck. No step is saved\n"),
        ("refused", 1, f"process 1 of 3 on {HOST}: out of luck. No step is saved\n"),
        ("failed", 1, f"process 1 of 3 on {HOST}: Traceback (most recent call last)"),
    ],
)
def test_what_ends_one_process_ends_all_with_one_error(tiny, tmp_path, monkeypatch, what, who, message):
    def strike(self):
        if rank() == who and self.global_step == 3:
            if what == "refused":
                raise UserError("out of luck")
            if what == "failed":
                raise ZeroDivisionError("a fault of the program")
            os.kill(os.getpid(), signal.SIGKILL if what == "killed" else signal.SIGSTOP)
        return prepare(self)

    prepare = engine.ReweightingEngine._prepare_step
    monkeypatch.setattr(engine.ReweightingEngine, "_prepare_step", strike)
    run, began = tiny(tmp_path / "run"), time.monotonic()
    run += ["--distributed_timeout", "0.1"] if what == "frozen" else []
    launched = Launched(3, lambda: command(run), tmp_path / "output")
    others = [process for number, process in enumerate(launched.processes) if number != who]
    for process in others:
        process.join(60)
    assert [process.exitcode for process in others] == [2, 2] and time.monotonic() - began < 60
    own = launched.exit_codes(5)[who]
    assert own == {"refused": 2, "failed": 1}.get(what, -signal.SIGKILL)
    printed = launched.printed()
    assert printed.count("another of the 3") + printed.count("process 1 of 3") + printed.count(
        "out of luck. No step is saved\n"
    ) == (2 if (what, who) == ("refused", 1) else 1), printed
    assert message in printed, printed
    assert printed.count("ZeroDivisionError: a fault of the program") == (what == "failed")


@pytest.mark.parametrize(
    ("world", "more", "message"),
    [
        (3, ("--batch_size", "2"), "--batch_size 2: 3 processes share the chains of a batch, which can be 2: use a"),
        (3, ("--meta_batch_size", "2"), "--meta_batch_size 2: 3 processes share"),
        (2, ("--shard", "--hypergradient", "darts"), "--hypergradient darts cannot move sharded parameters: use un"),
        (2, ("--device", "cpu:1"), "--device cpu:1: several processes compute on cuda"),
        (2, ("--shard", "--lora_rank", "2", "--no_freeze_projector"), "--shard with a trained projector beside"),
        (2, ("--no_such_flag",), "unrecognized arguments: --no_such_flag"),
        (1, ("--shard",), "--shard does nothing in one process"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_once(tiny, tmp_path, world, more, message):
    if world == 1:
        with pytest.raises(UserError, match=message):
            main(tiny(tmp_path / "run", *more))
        return
    launched = Launched(world, lambda: command(tiny(tmp_path / "run", *more)), tmp_path / "output")
    launched.processes[0].join(60)  # a launcher then ends the others
    for process in launched.processes[1:]:
        process.kill()
    printed = launched.printed()
    assert launched.exit_codes()[0] == 2 and printed.count("error: ") == 1 and message in printed, printed


def test_processes_with_other_flags_are_refused(tiny, tmp_path):
    def work() -> None:
        command(tiny(tmp_path / "run", "--lr", "0.01" if dist_env().rank else "0.02"))

    launched = Launched(2, work, tmp_path / "output")
    assert launched.exit_codes() == [2, 2]
    assert (
        launched.printed().count(f"error: process 1 on {HOST} has another lr than process 0: every process needs") == 1
    )
    assert launched.printed().count("error: ") == 1


def test_flags_that_one_process_alone_cannot_read(tmp_path):
    """The others have no store yet to agree by, and argparse's own message on that process is silenced."""

    def work() -> None:
        if dist_env().rank == 1:
            command(["--no_such_flag"])

    launched = Launched(2, work, tmp_path / "output")
    assert launched.exit_codes() == [0, 2]
    assert launched.printed().count(f"error: process 1 of 2 on {HOST}: its flags cannot be parsed") == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1, 0)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (0, 1, 0)),  # no launcher of one run
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "a"}, (1, 2, 0)),
        ({"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "2", "MASTER_ADDR": "a"}, (5, 8, 2)),
    ],
)
def test_the_launchers_variables(monkeypatch, variables, expected):
    for names in (rank0_output.TORCHRUN, *rank0_output.MPI, ("MASTER_ADDR",)):
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dist_env() == expected


def test_a_process_that_stops_prints_once(tiny, tmp_path):
    """SIGTERM to the last process alone: all save the same step, and process 0 says so."""
    run = tiny(tmp_path / "run")
    launched = Launched(2, lambda: command(run), tmp_path / "output")
    lines = tmp_path / "run" / "history.jsonl"
    while launched.processes[0].is_alive() and not (lines.exists() and lines.read_text()):
        time.sleep(0.02)
    launched.processes[1].terminate()
    assert launched.exit_codes() == [143, 143]
    assert launched.printed().count("stopped and saved at step") == 1
    saved = read_manifest(checkpoints(tmp_path / "run" / "checkpoints")[-1]).step
    assert f"saved at step {saved} of" in launched.printed() and len(history(tmp_path / "run")) == saved // 5
