"""The output folder: who may write into it, what is archived and what is refused, links, permissions, lost files."""

import json
import multiprocessing
import os
import pickle
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reweighting.errors import UserError
from reweighting.main import main
from reweighting.training import output_dir
from reweighting.training.checkpoints import checkpoint_name, checkpoints, load_latest
from reweighting.training.engine import ReweightingEngine
from reweighting.training.output_dir import lock_output_dir
from tests.runs import flags, history, same_results, weights
from tests.tiny import tiny_backbone


@pytest.fixture
def tiny(demo):
    """flags(), with the tiny backbone."""
    return lambda output, *more: flags(demo, output, "--reward_model", str(tiny_backbone()), *more)


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished")
    main(flags(demo, folder, "--reward_model", str(tiny_backbone())))
    return folder


class Killed(BaseException):
    """Nothing in a run handles it, as nothing handles SIGKILL."""


def kill_at_step(monkeypatch, step: int) -> None:
    """Let a run end without a word in a step."""
    original = ReweightingEngine.train_step

    def train_step(self):
        if self.global_step == step:
            self.persistent = False  # no last word either
            raise Killed
        original(self)

    monkeypatch.setattr(ReweightingEngine, "train_step", train_step)


def content(folder: Path) -> dict[str, bytes]:
    """All files under a folder but the lock and who holds it."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "run.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def hold_again_and_again(folder: str, started, results) -> None:
    for _ in range(20):
        started.wait()
        try:
            with lock_output_dir(folder, {}):
                time.sleep(0.02)
            results.put("held")
        except BaseException as error:
            results.put(f"{type(error).__name__}: {error}")


def test_of_five_starts_at_one_moment_one_holds_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    started, results = context.Barrier(5), context.Queue()
    processes = [context.Process(target=hold_again_and_again, args=(str(tmp_path / "run"), started, results))
                 for _ in range(5)]  # fmt: skip
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in range(100)]
    for process in processes:
        process.join()
    refused = [words for words in found if words != "held"]
    assert 20 <= found.count("held") and refused
    assert all("UserError: --weights_path" in words and "another run writes there (" in words for words in refused)
    assert all("it has just started" in words or "process " in words for words in refused)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "run.json"]


@pytest.mark.parametrize("more", [(), ("--resume",), ("--dry_run",)])
def test_a_second_run_leaves_the_first_alone(tiny, tmp_path, finished, more):
    """Also one that would resume while the first still runs."""
    folder = shutil.copytree(finished, tmp_path / "run")
    with lock_output_dir(str(folder), {}):
        before = content(folder)
        with pytest.raises(UserError, match=rf"another run writes there .process {os.getpid()} on .*, since 20"):
            main(tiny(folder, *more))
        assert content(folder) == before


def test_an_earlier_holder_is_not_named(tmp_path):
    with lock_output_dir(str(tmp_path), {}):
        run = json.loads((tmp_path / "run.json").read_text())
        for text in (json.dumps(run | {"process": 2**22 + 1}), "", "[]", "null", '{"process": "x"}', "[" * 10**5):
            (tmp_path / "run.json").write_text(text)
            with pytest.raises(UserError, match="another run writes there .it has just started"):
                with lock_output_dir(str(tmp_path), {}):
                    pass


def test_what_is_not_a_runs_is_never_moved(tiny, tmp_path, finished, monkeypatch):
    """The working folder as the output folder, with the user's own figures, checkpoints and prm in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("figures", "checkpoints", "prm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    before = content(tmp_path)
    for more in ((), ("--resume",), ("--dry_run",), ("--resume_from", str(finished))):
        with pytest.raises(UserError, match="checkpoints and prm and figures there may be yours.*Name another folder"):
            main(tiny(Path("."), *more))
        assert content(tmp_path) == before
    for name in ("figures", "checkpoints", "prm"):
        (tmp_path / name).rename(tmp_path / f"my-{name}")
    main(tiny(Path(".")))
    main(tiny(Path("."), "--seed", "2"))
    same_results(finished, tmp_path / "earlier-1")
    assert sorted(path.name for path in tmp_path.glob("my-*/mine")) == ["mine"] * 3
    (tmp_path / "run.json").write_text('{"process": 1, "outputs": "figures"}')  # proves nothing
    with pytest.raises(UserError, match="may be yours"):
        main(tiny(Path(".")))


@pytest.mark.parametrize("name", ["reward_model", "base", "domain_weights", "train_json_file", "image_root"])
def test_an_input_among_the_outputs_is_refused_before_anything_moves(demo, tiny, tmp_path, finished, name):
    folder = shutil.copytree(finished, tmp_path / "run")
    inner = str(shutil.copy(demo / "train.json", folder / "prm" / "train.json"))
    adapted = shutil.copytree(finished / "prm", tmp_path / "adapted")
    config = json.loads((adapted / "prm_config.json").read_text())
    config |= {"train": "head", "backbone": str(folder / "prm")}
    del config["files"]  # their digests, by which a changed folder is refused
    (adapted / "prm_config.json").write_text(json.dumps(config))
    more, words = {
        "reward_model": (("--reward_model", str(folder / "prm")), "--reward_model .*/prm"),
        "base": (("--reward_model", str(adapted), "--train", "head"), "the base of --reward_model .*/prm"),
        "domain_weights": (("--domain_weights", str(folder / "domain_weights.json")), "--domain_weights .*s.json"),
        "train_json_file": (("--train_json_file", inner, "--image_root", str(demo)), "--train_json_file .*train.json"),
        "image_root": (("--image_root", str(folder / "checkpoints" / ".." / "figures")), "--image_root .*figures"),
    }[name]
    before = content(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    for output in (folder, link, folder / "prm" / ".."):
        for how in ((), ("--resume",)):
            with pytest.raises(UserError, match=f"{words} lies among the outputs in --weights_path .*: name another"):
                with lock_output_dir(str(output), output_dir_inputs(tiny(output, *more, *how))):
                    pass
    assert content(folder) == before and not list(folder.glob("earlier-*"))


def output_dir_inputs(argv: list[str]) -> dict[str, str | None]:
    from reweighting.config.training import TrainingConfig
    from reweighting.training.resume import run_inputs

    return run_inputs(TrainingConfig.parse(argv))


def test_a_model_folder_is_no_output_folder(tiny, tmp_path):
    folder = shutil.copytree(tiny_backbone(), tmp_path / "model")
    before = content(folder)
    with pytest.raises(UserError, match="--reward_model .*model lies among the outputs"):
        main(tiny(folder, "--reward_model", str(folder)))
    assert content(folder) == before


def test_inputs_beside_the_outputs_stay_where_they_are(demo, tiny, tmp_path, finished):
    """Stage 2 from stage 1's archived model and weights, with the rows in the output folder itself."""
    folder = shutil.copytree(finished, tmp_path / "run")
    main(tiny(folder, "--seed", "2"))
    rows = str(shutil.copy(demo / "train.json", folder / "train.json"))
    fixed = str(folder / "earlier-1" / "domain_weights.json")
    run = tiny(folder, "--train_json_file", rows, "--image_root", str(demo), "--domain_weights", fixed)
    main(run)
    assert weights(folder) == pytest.approx(weights(finished), abs=1e-6)
    main([*run, "--iteration_num", "15", "--resume"])
    assert history(folder)[-1]["step"] == 15


def test_resumed_before_its_first_checkpoint_a_run_leaves_nothing_behind(tiny, tmp_path, finished, monkeypatch):
    folder = tmp_path / "run"
    for step in (2, 4, 5):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at_step(patch, step)
            main(tiny(folder, "--resume"))
    main(tiny(folder, "--resume"))
    same_results(finished, folder)
    assert not list(folder.glob("earlier-*"))


def test_resuming_a_finished_run_without_its_checkpoints_archives_it(tiny, tmp_path, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    for checkpoint_dir in checkpoints(folder / "checkpoints"):
        shutil.rmtree(checkpoint_dir)
    main(tiny(folder, "--resume", "--seed", "2"))
    assert weights(folder / "earlier-1") == weights(finished) != weights(folder)


def test_a_checkpoint_under_any_name_is_forked_under_its_own(tiny, tmp_path, finished, monkeypatch):
    copy = shutil.copytree(checkpoints(finished / "checkpoints")[0], tmp_path / "backup")
    monkeypatch.chdir(copy)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_step(patch, 7)
        main(tiny(tmp_path / "fork", "--resume_from", "."))
    assert [path.name for path in (tmp_path / "fork" / "checkpoints").iterdir()] == [checkpoint_name(5)]
    main(tiny(tmp_path / "fork", "--resume"))
    same_results(finished, tmp_path / "fork")


@pytest.mark.parametrize("moment", ["copying", "copied", "archived"])
def test_a_fork_killed_while_it_takes_over_loses_nothing(tiny, tmp_path, finished, monkeypatch, moment):
    folder = shutil.copytree(finished, tmp_path / "run")
    run = tiny(folder, "--resume_from", str(folder), "--iteration_num", "15")
    archive = output_dir.archive_previous_run

    def kill(*_, **__):
        if moment == "archived":
            archive(folder)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "copying":
            patch.setattr(output_dir.shutil, "copytree", kill)
        else:
            patch.setattr(output_dir, "archive_previous_run", kill)
        main(run)
    main(run)
    assert [line["step"] for line in history(folder)] == [5, 10, 15]
    same_results(finished, folder / "earlier-1")
    assert not list(folder.glob(".tmp-*"))


def test_a_run_follows_no_link_that_lies_in_its_folder(tiny, tmp_path, finished):
    """In a folder that others may write, one of them must not decide what is overwritten."""
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("theirs")
    folder.mkdir()
    for name in ("run.json", ".run.json.writing", ".history.jsonl.writing", ".write-test"):
        (folder / name).symlink_to(victim)
    main(tiny(folder))
    assert weights(folder) == weights(finished) and not (folder / "run.json").is_symlink()
    (folder / "history.jsonl").unlink()
    (folder / "history.jsonl").symlink_to(victim)
    main(tiny(folder, "--resume", "--iteration_num", "15"))
    assert [line["step"] for line in history(folder)] == [5, 10, 15]
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match="cannot be written: Too many levels of symbolic links"):
        main(tiny(folder, "--resume"))
    assert victim.read_text() == "theirs"


def test_every_output_follows_the_users_umask(tiny, tmp_path):
    before = os.umask(0o027)
    try:
        main(tiny(tmp_path / "run"))
    finally:
        os.umask(before)
    paths = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert any(path.suffix == ".safetensors" for path in paths)
    assert {path: mode for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}


def as_ordinary_user(work: Callable[[], object]) -> object:
    """The result of `work`, or its error, with the rights of an ordinary user: root may read and write everything."""
    if os.geteuid() != 0:
        try:
            return work()
        except UserError as error:
            return error
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            os.setgid(65534)
            os.setuid(65534)
            try:
                result = work()
            except UserError as error:
                result = error
            os.write(writer, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(result)


def open_to_all(folder: Path) -> Path:
    """Let an ordinary user into a folder and everything under it."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    for parent in folder.parents[:4]:  # one more below pytest-xdist
        parent.chmod(parent.stat().st_mode | 0o055)
    return folder


@pytest.mark.parametrize("name", [".", "checkpoints", "figures", "prm"])
def test_what_may_not_be_written_is_known_at_the_start(tmp_path, finished, name):
    folder = open_to_all(shutil.copytree(finished, tmp_path / "run"))

    def hold():
        with lock_output_dir(str(folder), {}):
            return "held"

    assert as_ordinary_user(hold) == "held"
    (folder / name).chmod(0o555)
    found = as_ordinary_user(hold)
    assert isinstance(found, UserError) and "cannot be written: Permission denied" in str(found)


@pytest.mark.parametrize("name", ["manifest.json", "state.pt", "history.jsonl", "prm/score_head.safetensors", "."])
def test_a_file_that_may_not_be_read_is_no_damaged_file(tmp_path, finished, name):
    folder = open_to_all(shutil.copytree(finished, tmp_path / "run"))
    newest = checkpoints(folder / "checkpoints")[-1]
    (newest / name).chmod(0o000)
    found = as_ordinary_user(lambda: load_latest(folder / "checkpoints"))
    (newest / name).chmod(0o777)
    assert isinstance(found, UserError) and "cannot be read: Permission denied" in str(found)
    assert checkpoints(folder / "checkpoints")[-1] == newest and len(list((folder / "checkpoints").iterdir())) == 2


def test_checkpoints_that_may_not_be_listed_are_not_taken_for_none(tmp_path, finished):
    folder = open_to_all(shutil.copytree(finished, tmp_path / "run"))
    (folder / "checkpoints").chmod(0o333)
    found = as_ordinary_user(lambda: load_latest(folder / "checkpoints"))
    assert isinstance(found, UserError) and "checkpoints cannot be read: Permission denied" in str(found)


def test_what_a_run_prints_of_its_folder_steers_no_terminal(demo, tiny, tmp_path, capsys):
    folder = tmp_path / "run\x1b[31m\a\u202e"
    rows = tmp_path / "rows\x1b[2J.json"
    rows.write_text((demo / "train.json").read_text().replace('"dice"', '"dice\\u001b[1m\\u0007"'))
    run = tiny(folder, "--train_json_file", str(rows), "--image_root", str(demo))
    main([*run, "--dry_run"])
    main([*run, "--resume"])
    main(run)
    (checkpoints(folder / "checkpoints")[-1] / "state.pt").write_bytes(b"")
    main([*run, "--resume", "--lr", "1e-4", "--allow_changed_settings"])
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert not {char for char in text if char not in "\n\r" and not char.isprintable()}
    for words in (r"run\x1b[31m\x07\u202e", r"dice\x1b[1m\x07", "GB are free in", "starting at step 0", "are now in",
                  "trying the checkpoint before it", "resuming from", "best checkpoint", "lr was"):  # fmt: skip
        assert words in text, words


def delete_at_step(monkeypatch, step: int, delete: Callable[[], None]) -> None:
    """Call `delete` while a run makes a step."""
    original = ReweightingEngine.train_step

    def train_step(self):
        if self.global_step == step:
            delete()
        original(self)

    monkeypatch.setattr(ReweightingEngine, "train_step", train_step)


def test_checkpoints_and_the_runs_name_deleted_under_a_run_cost_nothing(tiny, tmp_path, finished, monkeypatch):
    folder = tmp_path / "run"

    def delete():
        shutil.rmtree(folder / "checkpoints")
        (folder / "run.json").unlink()

    delete_at_step(monkeypatch, 7, delete)
    main(tiny(folder))
    same_results(finished, folder)
    assert [path.name for path in checkpoints(folder / "checkpoints")] == [checkpoint_name(10)]


def test_a_history_deleted_under_a_run_is_an_error_and_the_run_resumes(tiny, tmp_path, finished, monkeypatch):
    folder = tmp_path / "run"
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="step-00000010 cannot be written: No such file"),
    ):
        delete_at_step(patch, 7, (folder / "history.jsonl").unlink)
        main(tiny(folder))
    main(tiny(folder, "--resume"))
    same_results(finished, folder)


def test_a_folder_deleted_under_a_run_is_an_error(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    delete_at_step(monkeypatch, 7, lambda: shutil.rmtree(folder))
    with pytest.raises(UserError, match="step-00000010 cannot be written: No such file"):
        main(tiny(folder))
