"""A saved model that someone has changed: it gives the same scores, or ends with one line within 10 seconds.

Any JSON value anywhere in its files is replaced. The digests in `prm_config.json` are as they were saved or, forged,
those of the changed files, so that all later checks must hold too.
"""

import contextlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils import logging as transformers_logging

from reweighting.errors import UserError
from reweighting.modeling import saved_model
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.modeling.saved_model import CONFIG_FILE
from tests.forked import run
from tests.tiny import draw_cells, tiny_backbone

ROOT = Path(__file__).resolve().parents[2]
QUESTION, STEPS = "How many red cells?", ("Step 1: two", "Step 2: so 3")
SETTINGS = {"full": {"freeze_vision": True}, "lora": {"lora_rank": 2}}
LIMIT = 10  # seconds

NUMBERS = st.sampled_from([0, -1, 1, 2, 7, 1000, 10**9, 2**31, 2**63, 10**30, -(10**9), 0.5, 1e308])
NOT_NUMBERS = st.sampled_from([float("nan"), float("inf")])
TEXTS = st.sampled_from(
    ["", "x", "\0", "../..", "/dev/zero", "nn", "float64", "auto", "(a+)+$", "\ud800", "é" * 99_999]
)
TEXTS |= st.text(max_size=5)
LEAVES = st.none() | st.booleans() | NUMBERS | NOT_NUMBERS | TEXTS
VALUES = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=9), LEAVES, max_size=3)
VALUES |= st.sampled_from([[[[[]]]], {"a": {"b": [None]}}])


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    return draw_cells(tmp_path_factory.mktemp("images") / "cells.png")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Name -> folder of a saved model."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folders = {}
    for name, options in SETTINGS.items():
        torch.manual_seed(0)
        model = ProcessRewardModel.from_backbone(tiny_backbone(), **options)
        torch.nn.init.normal_(model.score_head.weight)
        folders[name] = tmp_path_factory.mktemp(name) / "prm"
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def expected(saved, image) -> dict[str, list[float]]:
    """Name -> scores of the untouched model."""
    return {name: scores(folder, image) for name, folder in saved.items()}


def scores(folder: Path, image: Path) -> list[float]:
    return ProcessRewardModel.from_pretrained(folder).score(image, QUESTION, STEPS)


@contextlib.contextmanager
def within(seconds: int):
    """Fail with AssertionError, wherever the block then is, if it takes longer."""

    def stop(*_):
        raise AssertionError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON value, itself first."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def replaced(value: Any, path: tuple, new: Any) -> Any:
    """The JSON value with another one at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def forge(folder: Path) -> None:
    """Give the folder the digests of the files that it has now."""
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
        values["files"] = {name: saved_model.digest(folder / name) for name in saved_model._files(folder)}
        values["files"][CONFIG_FILE] = saved_model._settings_digest(values)
        path.write_text(json.dumps(values))
    except (ValueError, TypeError, AttributeError):  # no longer an object: nothing can be forged
        pass


@st.composite
def tamperings(draw, folders: dict[str, Path]) -> tuple[str, str, str]:
    """(name of the model, name of the file, the file's new content)."""
    model = draw(st.sampled_from(sorted(folders)))
    files = sorted(path.name for path in folders[model].glob("*.json"))
    # The tokenizer's thousand places are mostly alike.
    file = draw(st.sampled_from([name for name in files if name != "tokenizer.json"] * 3 + ["tokenizer.json"]))
    value = json.loads((folders[model] / file).read_text())
    place = draw(st.sampled_from(places(value)))
    return model, file, json.dumps(replaced(value, place, draw(VALUES)))


def outcome(folder: Path, image: Path) -> list[float] | None:
    """The scores, or None after the known error in one line."""
    try:
        with within(LIMIT):
            return scores(folder, image)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
        return None


OPTIONS = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as a backbone's name may become a hub name


def check_tampering(saved, expected, image, folder, tampering, forged: bool) -> None:
    name, file, content = tampering
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved[name], folder)
    (folder / file).write_text(content)
    if forged:
        forge(folder)
    found = outcome(folder, image)
    assert forged or found in (None, expected[name])


def test_a_tampered_model_gives_the_same_scores_or_one_line(saved, expected, image, tmp_path, offline):
    @settings(OPTIONS, max_examples=400)
    @given(tampering=tamperings(saved))
    def check(tampering):
        check_tampering(saved, expected, image, tmp_path / "prm", tampering, forged=False)

    check()


def test_a_tampered_model_with_forged_digests_ends_in_one_line_or_scores(saved, expected, image, tmp_path, offline):
    @settings(OPTIONS, max_examples=100)
    @given(tampering=tamperings(saved))
    def check(tampering):
        check_tampering(saved, expected, image, tmp_path / "prm", tampering, forged=True)

    check()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("prm_config.json", "[]"),
        ("tokenizer_config.json", "null"),
        ("chat_template.jinja", "{{ raise_exception('x') }}"),
    ],
)
def test_the_command_ends_with_one_line_and_exit_code_2(saved, tmp_path, file, content):
    folder = shutil.copytree(saved["full"], tmp_path / "prm")
    (folder / file).write_text(content)
    row = {"id": 1, "input": "Q?", "candidates": ["Step 1: a", "Step 1: b"], "image_path": None}
    (tmp_path / "test.json").write_text(json.dumps([row]))
    flags = {"weights_path": folder, "candidates_json_file": tmp_path / "test.json", "output": tmp_path / "out.json"}
    done = run("best_of_n.py", *(word for flag, value in flags.items() for word in (f"--{flag}", str(value))))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
