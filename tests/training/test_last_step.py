"""An error in the middle of a run, expected or not: the last whole step is saved, and resuming equals no error."""

import json
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch

from reweighting.bilevel.problems import DomainReweighting, PRMFineTuning
from reweighting.errors import UserError
from reweighting.main import main
from reweighting.training.batches import BatchSource
from reweighting.training.checkpoints import checkpoints, read_manifest
from reweighting.training.validation import Validation
from tests.forked import PIPE, Command
from tests.runs import flags, same_results
from tests.tiny import build

CPU_MEMORY = "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to " \
             "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"  # fmt: skip


@pytest.fixture(scope="module")
def tiny(demo, tmp_path_factory):
    """flags(), with a tiny backbone that has dropout: random states matter."""
    backbone = build(tmp_path_factory.mktemp("dropout"))
    config = json.loads((backbone / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    (backbone / "config.json").write_text(json.dumps(config))
    return lambda output, *more: flags(demo, output, "--reward_model", str(backbone), *more)


def fail_at_call(patch, owner: type, method: str, call: int, error: Callable[[], BaseException], after=False) -> None:
    """Let the n-th call of a method raise an error, before or `after` doing its work."""
    original, calls = getattr(owner, method), []

    def failing(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == call and not after:
            raise error()
        result = original(self, *args, **kwargs)
        if len(calls) == call:
            raise error()
        return result

    patch.setattr(owner, method, failing)


def saved_step(folder) -> int:
    return read_manifest(checkpoints(folder / "checkpoints")[-1]).step


MORE = {
    "unrolled": (),
    "finite_difference": ("--hypergradient", "finite_difference", "--max_grad_norm", "0.1"),
    "lora": ("--lora_rank", "2", "--optimizer", "sgd"),
    "baseline": ("--baseline", "--gradient_accumulation", "2"),
}


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("unrolled", (6, 8, 10)),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("finite_difference", (8,)), ("lora", (9,)))),
        ("baseline", (8,)),
    ],
)
def test_an_error_in_a_steps_second_micro_batch_loses_nothing(tiny, tmp_path, monkeypatch, kind, steps):
    """Its first micro-batch has been added up and has drawn its dropout by then."""
    main(tiny(tmp_path / "whole", *MORE[kind]))
    for step in steps:
        run = tiny(tmp_path / str(step), *MORE[kind])
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            fail_at_call(patch, PRMFineTuning, "domain_loss", 2 * step, ZeroDivisionError)
            main(run)
        assert saved_step(tmp_path / str(step)) == step - 1
        main([*run, "--resume"])
        same_results(tmp_path / "whole", tmp_path / str(step))


@pytest.mark.parametrize(
    ("owner", "method", "after", "error", "caught", "words"),
    [
        (
            BatchSource, "train", False, lambda: RuntimeError(CPU_MEMORY), UserError,
            "^out of memory: 3.64 TiB for .* did not fit into main memory. Lower --batch_size.* saved at step 6",
        ),
        (PRMFineTuning, "backward", False, MemoryError, UserError, "memory: too much for .*saved at step 6: --resume"),
        (PRMFineTuning, "backward", True, KeyboardInterrupt, KeyboardInterrupt, None),
        (PRMFineTuning, "optimizer_step", False, lambda: OSError(5, "Input/output error"), OSError, None),
    ],
    ids=["reading", "forward", "backward", "before the optimizer"],
)  # fmt: skip
def test_any_error_anywhere_before_the_optimizer(
    tiny, tmp_path, monkeypatch, capsys, owner, method, after, error, caught, words
):
    call = 7 if method == "optimizer_step" else 14
    with monkeypatch.context() as patch, pytest.raises(caught, match=words):
        fail_at_call(patch, owner, method, call, error, after)
        main(tiny(tmp_path))
    assert saved_step(tmp_path) == 6
    assert caught is UserError or "saved at step 6: --resume continues from there" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_that_may_be_half_made_is_not_saved(tiny, tmp_path, monkeypatch, capsys):
    main(tiny(tmp_path / "whole"))
    for number, (owner, method, call, after) in enumerate((
        (torch.optim.AdamW, "step", 9, False),  # of both levels: the update after step 5 is one of them
        (torch.optim.AdamW, "step", 9, True),
        (PRMFineTuning, "optimizer_step", 8, True),
        (DomainReweighting, "training_step", 2, False),
        (DomainReweighting, "backward", 2, True),
        (PRMFineTuning, "mean_loss", 2, True),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            fail_at_call(patch, owner, method, call, ZeroDivisionError, after)
            main(tiny(folder))
        assert "The last checkpoint is of step 5" in capsys.readouterr().err and saved_step(folder) == 5, number
        main(tiny(folder, "--resume"))
        same_results(tmp_path / "whole", folder)


def test_an_error_of_the_validation_saves_the_step_that_was_to_be_scored(demo, tiny, tmp_path, monkeypatch):
    more = ("--validation_json_file", str(demo / "test.json"))
    main(tiny(tmp_path / "whole", *more))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="^out of memory.*saved at step 10"):
        fail_at_call(patch, Validation, "score_share", 2, MemoryError)
        main(tiny(tmp_path / "cut", *more))
    assert read_manifest(checkpoints(tmp_path / "cut" / "checkpoints")[-1]).score is None
    main(tiny(tmp_path / "cut", *more, "--resume"))
    same_results(tmp_path / "whole", tmp_path / "cut")


def test_where_the_disk_is_full_too_the_first_error_is_named(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise UserError("step-00000006 cannot be written: No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="^out of memory.*Saving .*No space"):
        fail_at_call(patch, PRMFineTuning, "domain_loss", 14, MemoryError)
        fail_at_call(patch, PRMFineTuning, "domain_loss", 13, lambda: patch.setattr(
            "reweighting.training.engine.save_checkpoint", full) or MemoryError())  # fmt: skip
        main(tiny(tmp_path))
    assert saved_step(tmp_path) == 5


def test_before_the_first_step_and_in_a_dry_run_nothing_is_saved(tiny, tmp_path, monkeypatch):
    for number, more in enumerate(((), ("--dry_run",))):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="^out of memory.*for that.[.]$"):
            fail_at_call(patch, PRMFineTuning, "domain_loss", 2, MemoryError)
            main(tiny(tmp_path / str(number), *more))
        assert not list(tmp_path.glob("*/checkpoints/*"))


def test_a_second_ctrl_c_ends_the_step_and_saves_the_one_before(tiny, tmp_path):
    run = tiny(tmp_path, "--iteration_num", "100000", "--save_every_iterations", "100000")
    original, calls = PRMFineTuning.domain_loss, []

    def slow(self, batch):
        calls.append(None)
        if len(calls) == 14:
            print("now", flush=True)
            time.sleep(100)
        return original(self, batch)

    def heed_and_slow_down() -> None:  # in the new process
        signal.signal(signal.SIGINT, signal.default_int_handler)
        PRMFineTuning.domain_loss = slow

    process = Command("main.py", *run, preexec_fn=heed_and_slow_down, stdout=PIPE, stderr=PIPE)
    for line in process.stdout:
        if line == "now\n":
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the first one waits for the step
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert "SIGINT: finishing this step" in errors and "The run is saved at step 6" in errors
    assert saved_step(tmp_path) == 6
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000006"]
