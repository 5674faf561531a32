"""A run that is cut anywhere and resumed equals one that was never cut; what a checkpoint refuses and survives."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT

import pytest
import torch
from safetensors.torch import load_file, save_file

from reweighting.errors import UserError
from reweighting.main import main
from reweighting.training.checkpoints import (
    best_checkpoint,
    checkpoints,
    load_checkpoint,
    read_manifest,
)
from reweighting.training.resume import check_same_run
from reweighting.training.signals import Stopped, StopSignals
from tests.forked import Command, heed_interrupts
from tests.runs import ROOT, StopAtStep, flags, history, same_results, sign, weights
from tests.tiny import build


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny backbone with dropout in its attention, whose input embedding is its output embedding too."""
    folder = build(tmp_path_factory.mktemp("dropout"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tiny(demo, backbone):
    """flags(), with the tiny backbone."""
    return lambda output, *more: flags(demo, output, "--reward_model", str(backbone), *more)


@pytest.fixture(scope="module")
def finished(demo, backbone, tmp_path_factory):
    """A finished run with the tiny backbone."""
    folder = tmp_path_factory.mktemp("finished")
    main(flags(demo, folder, "--reward_model", str(backbone)))
    return folder


def cut_and_resume(monkeypatch, run: list[str], steps: int, *more: str) -> None:
    """Start the run, stop it after so many steps, and resume it with `more` flags."""
    with monkeypatch.context() as patch:
        patch.setattr("reweighting.main.StopSignals", lambda: StopAtStep(steps))
        with pytest.raises(Stopped, match=f"stopped and saved at step {steps} of"):
            main(run)
    main([*run, "--resume", *more])


@pytest.mark.parametrize("cut", [pytest.param(3, marks=pytest.mark.slow), 5, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--lora_rank", "2", "--precision", "bf16"),
        ("--optimizer", "sgd", "--scheduler", "step", "--scheduler_step_size", "3"),
        ("--gradient_accumulation", "3", "--max_grad_norm", "0.1", "--no_freeze_vision"),
        ("--baseline", "--scheduler", "constant"),
        ("--hypergradient", "darts"),
    ],
    ids=["plain", "lora-bf16", "sgd", "accumulation", "baseline", "darts"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tiny, tmp_path, monkeypatch, more, cut):
    main(tiny(tmp_path / "whole", *more))
    cut_and_resume(monkeypatch, tiny(tmp_path / "cut", *more), cut)
    same_results(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    "more",
    [
        ("--train", "dora", "--lora_rank", "2", "--score_head", "linear_from_token"),
        pytest.param(("--lora_rank", "2", "--no_freeze_projector", "--precision", "bf16"), marks=pytest.mark.slow),
        ("--train", "head", "--attention", "eager"),
        ("--train", "head", "--score_head", "mlp", "--lower_loss", "bce"),
        pytest.param(
            ("--score_head", "token", "--correct_token", "Step", "--no_freeze_vision", "--freeze_projector"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dora", "projector", "head", "mlp-bce", "token"],
)
def test_every_way_to_train_resumes(tiny, tmp_path, monkeypatch, more):
    test_a_resumed_run_equals_the_uninterrupted_one(tiny, tmp_path, monkeypatch, more, cut=3)
    assert len(set(weights(tmp_path / "cut").values())) > 1  # the meta gradient has reached what is trained


def test_dropout_is_at_work(tiny, tmp_path, finished, backbone):
    """Else the test above would not show that random states are kept."""
    config = json.loads((backbone / "config.json").read_text())
    without = shutil.copytree(backbone, tmp_path / "backbone")
    config["text_config"]["attention_dropout"] = 0.0
    (without / "config.json").write_text(json.dumps(config))
    main(tiny(tmp_path / "run", "--reward_model", str(without)))
    assert weights(tmp_path / "run") != weights(finished)


@pytest.mark.slow
def test_killed_at_random_moments(tiny, tmp_path, finished):
    """The real command, killed with SIGKILL again and again, ends with the files of the uninterrupted run."""
    rng, folder, whole = random.Random(0), tmp_path / "killed", tmp_path / "whole"
    more = ("--iteration_num", "60", "--save_every_iterations", "20", "--resume")
    main(tiny(whole, *more))
    lost = []  # steps between the newest checkpoint and the kill
    # Once while it starts, then after these steps at the earliest, then not at all.
    for step in (None, 5, 25, 30, 45, 1000):
        process = Command("main.py", *tiny(folder, *more), stdout=DEVNULL, stderr=PIPE)
        if step is None:
            time.sleep(rng.uniform(0, 4))
            process.kill()
        while process.poll() is None:
            if step is not None and reached(folder) >= step:
                time.sleep(rng.uniform(0, 0.1))
                process.kill()
            time.sleep(0.002)
        errors = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), errors
        places = checkpoints(folder / "checkpoints")
        lost.append(reached(folder) - (read_manifest(places[-1]).step if places else 0))
    assert process.returncode == 0 and max(lost) > 0 and lost[-1] == 0
    same_results(whole, folder)


def reached(folder: Path) -> int:
    """The last step in the history so far, 0 at the start."""
    path = folder / "history.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last line may be half-written
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_ends_the_command_with_everything_saved(tiny, tmp_path, name):
    run = tiny(tmp_path, "--iteration_num", "100000", "--save_every_iterations", "100000")
    process = Command("main.py", *run, stdout=DEVNULL, stderr=PIPE)
    started = time.monotonic()
    while not (tmp_path / "history.jsonl").exists() or not (tmp_path / "history.jsonl").stat().st_size:
        assert time.monotonic() - started < 120 and process.poll() is None
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + getattr(signal, name)
    assert "Traceback" not in errors and "--resume" in errors
    (checkpoint_dir,) = checkpoints(tmp_path / "checkpoints")
    step = read_manifest(checkpoint_dir).step
    assert f"saved at step {step} of 100000" in errors and history(tmp_path)[-1]["step"] == step // 5 * 5


def wait_for_a_step(process: subprocess.Popen, folder: Path, terminal: int | None = None) -> None:
    """Wait until a run has written its first line of history, and read what it prints on its terminal meanwhile."""
    started = time.monotonic()
    while not reached(folder):
        assert time.monotonic() - started < 120 and process.poll() is None
        with suppress(BlockingIOError, OSError):
            terminal is not None and os.read(terminal, 2**16)
        time.sleep(0.05)


def test_a_terminal_that_goes_away_ends_the_command_with_everything_saved(tiny, tmp_path):
    """As when an SSH connection breaks: the system sends SIGHUP, and nothing can be printed any more."""
    run = tiny(tmp_path, "--iteration_num", "100000", "--save_every_iterations", "100000")
    terminal, inner = os.openpty()
    os.set_blocking(terminal, False)

    def own_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.setsid()
        fcntl.ioctl(inner, termios.TIOCSCTTY, 0)

    process = Command("main.py", *run, stdin=inner, stdout=inner, stderr=inner, preexec_fn=own_terminal)
    os.close(inner)
    wait_for_a_step(process, tmp_path, terminal)
    os.close(terminal)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert len(checkpoints(tmp_path / "checkpoints")) == 1


def test_nohup_outlives_the_terminal(tiny, tmp_path):
    run = tiny(tmp_path, "--iteration_num", "20")
    ignore = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    process = Command("main.py", *run, stdout=DEVNULL, stderr=PIPE, preexec_fn=ignore)
    wait_for_a_step(process, tmp_path)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0 and reached(tmp_path) == 20


@pytest.mark.parametrize("moment", ["loading", "training"])
def test_ctrl_c_with_nobody_reading(tiny, tmp_path, moment):
    """Ctrl-C in `main.py | tee log` ends the reader too: nothing can be printed any more, all is saved."""
    run = tiny(tmp_path, "--iteration_num", "100000", "--save_every_iterations", "100000")
    streams = {"stdout": PIPE, "stderr": STDOUT, "preexec_fn": heed_interrupts}
    if moment == "training":
        process = Command("main.py", *run, **streams)
    else:  # imports
        process = subprocess.Popen([sys.executable, str(ROOT / "reweighting" / "main.py"), *run], **streams)
    while moment == "training" and not reached(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3 if moment == "loading" else 0)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == (-signal.SIGINT if moment == "loading" else 128 + signal.SIGINT)
    assert bool(checkpoints(tmp_path / "checkpoints")) == (moment == "training")


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(tiny, tmp_path, finished, capsys):
    for number, spoil in enumerate((
        lambda checkpoint_dir: os.truncate(checkpoint_dir / "state.pt", 1000),
        lambda checkpoint_dir: (checkpoint_dir / "history.jsonl").unlink(),
        lambda checkpoint_dir: (checkpoint_dir / "manifest.json").write_text("{"),
        lambda checkpoint_dir: (checkpoint_dir / "prm" / "score_head.safetensors").write_bytes(b"x"),
    )):  # fmt: skip
        folder = shutil.copytree(finished, tmp_path / str(number))
        newest = checkpoints(folder / "checkpoints")[-1]
        spoil(newest)
        main(tiny(folder, "--resume"))
        shown = capsys.readouterr()
        assert str(newest) in shown.err and "trying the checkpoint before it" in shown.err
        assert "resumed at step 5" in shown.out
        same_results(finished, folder)
        assert newest.with_name(f"damaged-{newest.name}").exists() and newest.exists()  # the new one
    for checkpoint_dir in checkpoints(folder / "checkpoints"):
        (checkpoint_dir / "state.pt").unlink()
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        main(tiny(folder, "--resume"))


def test_a_checkpoint_runs_no_code(tiny, tmp_path, finished):
    """A pickle that would write a file is refused, even with the right checksum."""
    folder, proof = shutil.copytree(finished, tmp_path / "run"), tmp_path / "proof"

    class Bomb:
        def __reduce__(self):
            return Path.write_text, (proof, "code ran")

    checkpoint_dir = checkpoints(folder / "checkpoints")[-1]
    state = load_checkpoint(checkpoint_dir)
    torch.save(state | {"settings": Bomb()}, checkpoint_dir / "state.pt")
    sign(checkpoint_dir)
    main(tiny(folder, "--resume"))  # from the checkpoint before
    assert not proof.exists()


def test_what_may_change_when_a_run_resumes(demo, backbone, tiny, tmp_path, finished, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    for more, word in (
        (("--lr", "1e-5"), "lr was 0.0003"),
        (("--batch_size", "3"), "batch_size was 2"),
        (("--precision", "bf16"), "precision was fp32"),
    ):
        with pytest.raises(UserError, match=f"{word}.*--allow_changed_settings"):
            main(tiny(folder, *more, "--resume"))
    other = tmp_path / "other.json"
    rows = json.loads((demo / "train.json").read_text())
    other.write_text(json.dumps(rows[:-1]))
    moved = ("--train_json_file", str(other), "--image_root", str(demo))
    with pytest.raises(UserError, match="the content of the training or meta data"):
        main(tiny(folder, *moved, "--resume"))
    changed = shutil.copytree(backbone, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="the content of the backbone has changed"):
        main(tiny(folder, "--reward_model", str(changed), "--resume"))
    with pytest.raises(UserError, match="the checkpoint is at step 10 already"):
        main(tiny(folder, "--iteration_num", "5", "--resume"))
    other.write_bytes((demo / "train.json").read_bytes())  # the same content elsewhere is the same data
    link = tmp_path / "link"
    link.symlink_to(backbone)  # and another name of the backbone the same backbone
    same = ("--reward_model", str(link), "--precision", "fp32")
    main(tiny(folder, *moved, *same, "--iteration_num", "15", "--resume"))
    assert [line["step"] for line in history(folder)] == [5, 10, 15]
    main(tiny(folder, "--lr", "1e-2", "--iteration_num", "20", "--resume", "--allow_changed_settings"))
    assert "since step 15, lr was 0.0003 and is 0.01 now" in capsys.readouterr().err
    state = load_checkpoint(checkpoints(folder / "checkpoints")[-1])
    assert state["step"] == 20 and state["settings"]["lr"] == 0.01
    with pytest.raises(UserError, match="does not fit the settings"):
        main(tiny(folder, "--lora_rank", "2", "--iteration_num", "25", "--resume", "--allow_changed_settings"))


def test_a_checkpoint_from_before_a_flag_was_there_had_its_default(finished):
    state = load_checkpoint(checkpoints(finished / "checkpoints")[-1])
    settings = dict(state["settings"])
    for name in ("train", "score_head", "attention", "load_in_4bit"):
        del state["settings"][name]
    check_same_run(state, settings, False)
    with pytest.raises(UserError, match="lora_rank was 0 and is 16 now; train was full and is dora now"):
        check_same_run(state, settings | {"train": "dora", "lora_rank": 16}, False)


def test_another_accumulation_is_taken_over_where_a_window_ends(tiny, tmp_path, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    more = ("--gradient_accumulation", "4", "--iteration_num", "20", "--resume", "--allow_changed_settings")
    main(tiny(folder, *more))
    assert [line["step"] for line in history(folder)] == [5, 10, 15, 20]
    assert len(set(map(str, (line["weights"] for line in history(folder))))) == 4, "an update was left out"


def test_resume_from_a_named_checkpoint_or_run(tiny, tmp_path, finished, monkeypatch):
    first = checkpoints(finished / "checkpoints")[0]
    main(tiny(tmp_path / "fork", "--resume_from", str(first)))
    same_results(finished, tmp_path / "fork")
    main(tiny(tmp_path / "fork", "--resume_from", str(tmp_path / "fork"), "--iteration_num", "15"))
    assert [line["step"] for line in history(tmp_path / "fork")] == [5, 10, 15]
    assert weights(tmp_path / "fork" / "earlier-1") == weights(finished)


def test_a_fork_killed_before_its_first_save_resumes(tiny, tmp_path, finished, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    first = checkpoints(finished / "checkpoints")[0]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("reweighting.training.engine.ReweightingEngine.train_step", kill)
        main(tiny(tmp_path / "fork", "--resume_from", str(first)))
    main(tiny(tmp_path / "fork", "--resume"))
    same_results(finished, tmp_path / "fork")


def test_a_cut_off_line_of_history_is_made_anew(tiny, tmp_path, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(checkpoints(folder / "checkpoints")[-1])
    whole = (folder / "history.jsonl").read_text()
    (folder / "history.jsonl").write_text(whole[:-40])
    main(tiny(folder, "--resume"))
    same_results(finished, folder)


def test_a_new_run_in_a_used_folder_archives_the_old_one(tiny, tmp_path, finished, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    main(tiny(folder, "--seed", "2"))
    assert "are now in" in capsys.readouterr().out
    same_results(finished, folder / "earlier-1")
    assert weights(folder) != weights(finished) and len(checkpoints(folder / "checkpoints")) == 2


def test_resume_before_there_is_a_checkpoint_starts_at_the_beginning(tiny, tmp_path, finished, capsys):
    main(tiny(tmp_path / "new", "--resume"))
    assert "starting at step 0" in capsys.readouterr().out
    same_results(finished, tmp_path / "new")


def test_checkpoints_are_scored_by_the_meta_loss_or_on_validation_rows(demo, tiny, tmp_path, finished, capsys):
    manifests = [read_manifest(checkpoint_dir) for checkpoint_dir in checkpoints(finished / "checkpoints")]
    assert [m.score_name for m in manifests] == ["minus the meta loss"] * 2
    assert [-m.score for m in manifests] == [line["meta_loss"] for line in history(finished)]
    more = ("--validation_json_file", str(demo / "test.json"), "--baseline", "--keep_checkpoints", "1")
    main(tiny(tmp_path, *more))
    assert f"best checkpoint by best-of-N accuracy on {demo / 'test.json'} (" in capsys.readouterr().out
    name = read_manifest(checkpoints(tmp_path / "checkpoints")[-1]).score_name
    assert name.startswith("best-of-N accuracy on ")
    manifest = read_manifest(best_checkpoint(tmp_path / "checkpoints", name)[0])
    assert manifest.score * 6 == pytest.approx(round(manifest.score * 6))  # of six questions


def test_a_save_after_damage_is_not_rotated_away(tiny, tmp_path, finished, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "run")
    (checkpoints(folder / "checkpoints")[-1] / "state.pt").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr("reweighting.main.StopSignals", lambda: StopAtStep(1))
        with pytest.raises(Stopped, match="saved at step 6"):
            main(tiny(folder, "--resume", "--keep_checkpoints", "1"))
    assert read_manifest(checkpoints(folder / "checkpoints")[-1]).step == 6


def test_a_command_that_cannot_run_moves_nothing(tiny, tmp_path, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    kept = ("checkpoints", "prm", "history.jsonl", "domain_weights.json")
    for more in (
        ("--reward_model", "/typo"),
        ("--resume_from", str(folder), "--max_length", "5", "--allow_changed_settings"),
    ):
        with pytest.raises(UserError):
            main(tiny(folder, *more))
        assert all((folder / name).exists() for name in kept) and not (folder / "earlier-1").exists()


def test_a_renamed_domain_is_not_taken_for_another(demo, tiny, tmp_path, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    other = tmp_path / "other.json"
    other.write_text((demo / "train.json").read_text().replace('"dice"', '"zzz"'))
    more = ("--train_json_file", str(other), "--image_root", str(demo), "--allow_changed_settings", "--resume")
    with pytest.raises(UserError, match="does not fit .*its domains are bar_chart"):
        main(tiny(folder, *more))
