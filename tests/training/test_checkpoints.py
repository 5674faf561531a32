"""Checkpoints with wrong content: damaged, however right their checksums are, and hence the one before is taken."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reweighting.config.training import TrainingConfig
from reweighting.errors import UserError
from reweighting.main import build_engine, main
from reweighting.training.checkpoints import (
    FORMAT_VERSION,
    best_checkpoint,
    checkpoint_name,
    checkpoints,
    load_checkpoint,
    load_latest,
    read_manifest,
    remove_old,
)
from reweighting.training.resume import check_same_run, run_settings
from reweighting.training.run_data import read_run_data
from reweighting.training.saved_state import check_state
from tests.runs import flags, same_results, sign
from tests.tiny import tiny_backbone


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory):
    """The flags of a run that is finished, without its folder."""
    return flags(demo, tmp_path_factory.mktemp("finished"), "--reward_model", str(tiny_backbone()))


@pytest.fixture(scope="module")
def finished(run):
    """The folder of that run."""
    main(run)
    return Path(run[run.index("--weights_path") + 1])


@pytest.fixture(scope="module")
def state(finished):
    """The state of its newest checkpoint."""
    return load_checkpoint(checkpoints(finished / "checkpoints")[-1])


@pytest.fixture
def newest(finished, tmp_path):
    """The newest of two checkpoints of a copy of that run."""
    return checkpoints(shutil.copytree(finished, tmp_path / "run") / "checkpoints")[-1]


def change(*path: Any, value: Any) -> Callable[[Path], None]:
    """What puts a value into a checkpoint's state; `...` as the value removes what is there."""

    def spoil(checkpoint_dir: Path) -> None:
        state = torch.load(checkpoint_dir / "state.pt", weights_only=True)
        container = state
        for key in path[:-1]:
            container = container[key]
        if value is ...:
            del container[path[-1]]
        else:
            container[path[-1]] = value
        torch.save(state, checkpoint_dir / "state.pt")
        sign(checkpoint_dir)

    return spoil


def manifest(**changes: Any) -> Callable[[Path], None]:
    return lambda checkpoint_dir: sign(checkpoint_dir, **changes)


def name_a_file(name: str) -> Callable[[Path], None]:
    def spoil(checkpoint_dir: Path) -> None:
        files = json.loads((checkpoint_dir / "manifest.json").read_text())["files"]
        sign(checkpoint_dir, files=files | {name: 64 * "0"})

    return spoil


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(checkpoint_dir: Path) -> None:
        (checkpoint_dir / name).write_bytes(content)
        if name != "manifest.json":
            sign(checkpoint_dir)

    return spoil


def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(checkpoint_dir: Path) -> None:
        (checkpoint_dir / name).unlink()
        make(checkpoint_dir / name)

    return spoil


def to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


NUMPY_STATE = ("MT19937", torch.zeros(624, dtype=torch.int64), 10**9, 0, 0.0)
SPOILT = {
    "no settings": change("settings", value=...),
    "settings are a list": change("settings", value=[1]),
    "no step": change("step", value=...),
    "a step of -5": change("step", value=-5),
    "a step that is a text": change("step", value="10"),
    "another step than the manifest's": change("step", value=5),
    "domains are a number": change("domains", value=3),
    "seconds are no number": change("seconds", value=float("nan")),
    "scores are texts": change("meta_losses", value=["0.1"]),
    "no random states": change("random", value={}),
    "python's random state is short": change("random", "python", value=(3, (1, 2, 3), None)),
    "numpy's random state has an impossible position": change("random", "numpy", value=NUMPY_STATE),
    "torch's random state is of another type": change("random", "torch", value=torch.zeros(5)),
    "another process's random states are a text": change("random_of_others", value=["x"]),
    "problems are a list": change("problems", value=[]),
    "a count of -1": change("problems", "lower", "count", value=-1),
    "no micro-steps in a step": change("problems", "lower", "micro_steps", value=0),
    "parameters are texts": change("problems", "upper", "module", value={"alpha": "1"}),
    "state.pt holds a list": lambda folder: (torch.save([1], folder / "state.pt"), sign(folder)),
    "state.pt is empty": write("state.pt", b""),
    "state.pt is a device": replace("state.pt", to_zero),
    "state.pt is a FIFO": replace("state.pt", os.mkfifo),
    "state.pt is a folder": replace("state.pt", Path.mkdir),
    "the score is a text": manifest(score="0.5", score_name="minus the meta loss"),
    "the score is no number": manifest(score=float("nan")),
    "the score's name is a number": manifest(score_name=1),
    "the manifest's step is a text": manifest(step="10"),
    "the manifest's step is -5": manifest(step=-5),
    "the manifest's step is true": manifest(step=True),
    "the manifest's step is huge": manifest(step=10**400),
    "the format is a text": manifest(format_version="2"),
    "files are a list": manifest(files=["state.pt"]),
    "no file is named": manifest(files={}),
    "a checksum is none": manifest(files={"state.pt": "x", "history.jsonl": "x"}),
    "a device is named": name_a_file("/dev/zero"),
    "a file outside is named": name_a_file("../../run.json"),
    "a missing file is named": name_a_file("missing"),
    "an impossible file is named": name_a_file("a\0b"),
    "a far too long file name": name_a_file("a" * 5000),
    "the manifest is a list": write("manifest.json", b"[]"),
    "the manifest is cut": write("manifest.json", b'{"step": 1'),
    "the manifest is nested deeply": write("manifest.json", b"[" * 10**6),
    "the manifest is no UTF-8": write("manifest.json", b'{"step": "\xff"}'),
    "the manifest is a device": replace("manifest.json", to_zero),
    "the manifest is a FIFO": replace("manifest.json", os.mkfifo),
    "the history is no UTF-8": write("history.jsonl", b'{"step": 5, "\xff": 1}\n'),
    "the history is a text": write("history.jsonl", b"once upon a time\n"),
    "a line of the history is a number": write("history.jsonl", b"5\n"),
    "a line of the history is empty": write("history.jsonl", b"{}\n"),
    "the history is from the future": lambda folder: write(
        "history.jsonl", (folder / "history.jsonl").read_bytes().replace(b'"step": 10,', b'"step": 15,'))(folder),
    "the history is a FIFO": replace("history.jsonl", os.mkfifo),
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_wrong_content_is_damage_and_the_checkpoint_before_is_taken(newest, capsys, spoil):
    spoil(newest)
    checkpoint_dir, state = load_latest(newest.parent)
    assert checkpoint_dir.name == checkpoint_name(5) and state["step"] == 5
    warning = capsys.readouterr().err
    assert str(newest) in warning and "trying the checkpoint before it" in warning
    assert len(warning) < len(str(newest)) + 500 and warning.count("\n") == 1
    assert newest.with_name(f"damaged-{newest.name}").exists() and not newest.exists()


def test_the_command_takes_the_one_before(run, finished, newest):
    change("step", value="10")(newest)
    folder = newest.parent.parent
    main([*run, "--weights_path", str(folder), "--resume"])
    same_results(finished, folder)


def test_a_checkpoint_of_another_version_is_refused_and_left_alone(run, newest):
    """One from before the flags got their present names has no format version."""
    folder = newest.parent.parent
    change("settings", "base_4bit", value=False)(newest)
    content = json.loads((newest / "manifest.json").read_text())
    del content["format_version"]
    for version in ({}, {"format_version": FORMAT_VERSION - 1}, {"format_version": FORMAT_VERSION + 1}):
        (newest / "manifest.json").write_text(json.dumps(content | version))
        before = sorted(folder.rglob("*"))
        for how in (("--resume",), ("--resume_from", str(newest)), ("--resume_from", str(folder))):
            with pytest.raises(UserError, match="00010 was written by another version .*start a new one$"):
                main([*run, "--weights_path", str(folder), *how])
        assert sorted(folder.rglob("*")) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths_in(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to everything inside nested containers."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths_in(inner, (*path, key))
    return found


def with_value(content: Any, path: tuple, value: Any) -> Any:
    content = copy.deepcopy(content)
    container = content
    for key in path[:-1]:
        container = container[key]
    container[path[-1]] = value
    return content


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_value_anywhere_loads_or_is_one_error(finished, tmp_path, data):
    checkpoint_dir = tmp_path / "checkpoint"
    shutil.rmtree(checkpoint_dir, ignore_errors=True)
    shutil.copytree(checkpoints(finished / "checkpoints")[-1], checkpoint_dir)
    if data.draw(st.booleans()):
        content = json.loads((checkpoint_dir / "manifest.json").read_text())
        path = data.draw(st.sampled_from(paths_in(content)))
        (checkpoint_dir / "manifest.json").write_text(json.dumps(with_value(content, path, data.draw(JSON))))
    else:
        lines = [json.loads(line) for line in (checkpoint_dir / "history.jsonl").read_text().splitlines()]
        path = data.draw(st.sampled_from(paths_in(lines)))
        lines = with_value(lines, path, data.draw(JSON))
        (checkpoint_dir / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        sign(checkpoint_dir)
    try:
        assert load_checkpoint(checkpoint_dir)["step"] == 10
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


def test_any_value_in_the_state_of_a_level_resumes_or_is_one_error(run, state, tmp_path):
    """What `load_checkpoint` lets through meets the engine, which says that it does not fit."""
    config = TrainingConfig.parse(run)
    engine = build_engine(config, run_settings(config), read_run_data(config), tmp_path)
    rng, outcomes = random.Random(0), set()
    candidates = [path for path in paths_in(state) if path[0] in ("problems", "domains", "warned")]
    for path in rng.sample(candidates, 60):
        for value in (None, "x", -1, 10**30, [], {}, torch.zeros(3), torch.zeros(0, dtype=torch.int64), {"x": [1]}):
            spoilt = with_value(state, path, value)
            try:
                check_state(spoilt, 10)
            except Exception:
                outcomes.add("damaged")
                continue
            try:
                engine.load_state_dict(spoilt)
                outcomes.add("resumed")
            except UserError as error:
                assert "does not fit" in str(error)
                outcomes.add("refused")
    assert outcomes == {"damaged", "resumed", "refused"}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_value_in_the_saved_settings_is_another_run_or_none(state, data):
    now = state["settings"]
    name, value = data.draw(st.sampled_from([*now, "new"])), data.draw(JSON | st.just(...))
    saved = {key: kept for key, kept in now.items() if key != name} | ({} if value is ... else {name: value})
    try:
        check_same_run(state | {"settings": saved}, now, False)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    files = dict.fromkeys(("state.pt", "history.jsonl"), 64 * "0")
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.3), (4, 0.4), (5, None)):
        checkpoint_dir = tmp_path / checkpoint_name(step)
        checkpoint_dir.mkdir()
        content = {"format_version": FORMAT_VERSION, "step": step, "files": files}
        content |= {} if score is None else {"score": score, "score_name": "a"}
        (checkpoint_dir / "manifest.json").write_text(json.dumps(content))
    (tmp_path / "step-mine").mkdir()
    remove_old(tmp_path, 2, "a")
    assert (tmp_path / "step-mine").exists()
    assert [int(checkpoint_dir.name[-1]) for checkpoint_dir in checkpoints(tmp_path)] == [2, 4, 5]
    assert best_checkpoint(tmp_path, "a") == (tmp_path / "step-00000002", 0.9)
    assert best_checkpoint(tmp_path, "b") is None
    remove_old(tmp_path, 1, "b")
    assert [int(checkpoint_dir.name[-1]) for checkpoint_dir in checkpoints(tmp_path)] == [5]
    assert read_manifest(tmp_path / "step-00000005").score is None
    for name in ("step-100000000", "step-٣", "step-²", "step-"):
        (tmp_path / name).mkdir()
    assert [checkpoint_dir.name for checkpoint_dir in checkpoints(tmp_path)] == ["step-00000005", "step-100000000"]
