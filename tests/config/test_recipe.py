"""Recipes that are no flat, small files of flags: one line of error, at once."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reweighting.config.recipe import MAX_BYTES, read_recipe
from reweighting.config.training import GROUPS, TrainingConfig, flag_defaults
from reweighting.errors import UserError

NEEDED = ["--train_json_file", "t", "--meta_json_file", "m"]
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


def refused(path: Path) -> str:
    """The one line that a recipe is refused with, within two seconds."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        TrainingConfig.parse(["--config", str(path), *NEEDED])
    message = str(caught.value)
    assert time.monotonic() - started < 2 and "\n" not in message and len(message) < len(str(path)) + 300, message
    return message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "aliases .* in line 2"),
        ("lr: &x 1\nmeta_lr: *x\n", "aliases .* in line 2"),
        ("a: &a\n  b: *a\n", "aliases"),
        ("lr: " + "9" * 3_000_000, "larger than 65536 bytes"),
        ("lr: " + "9" * 5000, "cannot be read: Exceeds the limit"),
        ("lr: " + "x" * 60_000, "lr: found 'xxxx"),
        ("x" * 1000 + ": 1", "xxx: there is no such flag"),
        ("[" * 60_000, "nested values in line 1"),
        ("{" * 60_000, "nested values in line 1"),
        ("lr: !!python/object/apply:os.system ['touch proof']", "could not determine a constructor .* in line 1"),
        ("lr: [1\nseed: 2", "cannot be read: .* in line 2"),
        ("lr: 2024-01-01", "lr: found datetime.date"),
        ("? [a]\n: 1", "unhashable key in line 1"),
        ('"\\e[31m": 1', r"\\x1b\[31m: there is no such flag"),
        ("", "expected names and values"),
    ],
    ids=lambda value: value[:20],
)
def test_a_recipe_is_small_and_flat(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    message = refused(path)
    assert re.search(words, message), message
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_a_recipe_that_is_no_file_of_text(tmp_path):
    (tmp_path / "bytes").write_bytes(b"lr: \xff")
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "bytes", "can't decode"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
    ):
        assert words in refused(path)


def test_a_large_but_allowed_recipe_is_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("# a comment\n" * 5000 + "lr: 1e-5\ngradient_accumulation: 3\n")
    assert path.stat().st_size < MAX_BYTES
    assert read_recipe(path, GROUPS) == {"lr": 1e-5, "gradiant_accumulation": 3}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=st.dictionaries(st.sampled_from(sorted(flag_defaults())) | st.text(max_size=5), VALUES, max_size=3))
def test_any_values_are_flags_or_one_error(tmp_path, recipe):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    try:
        TrainingConfig.parse(["--config", str(path), *NEEDED])
    except UserError as error:
        assert len(str(error)) < len(str(path)) + 500


@pytest.mark.parametrize("value", ["", " ", "\t\n"])
@pytest.mark.parametrize(
    "name", ["weights_path", "train_json_file", "meta_json_file", "validation_json_file", "image_root", "reward_model",
             "resume_from", "device", "domain_weights"],
)  # fmt: skip
def test_an_empty_value_is_refused(tmp_path, monkeypatch, name, value):
    """An empty --weights_path would be the working folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--{name}: found an empty value: name one, or leave the flag out"):
        TrainingConfig.parse([*NEEDED, f"--{name}", value])
    (tmp_path / "recipe.json").write_text(json.dumps({name: value}))
    rest = [word for flag in ("train_json_file", "meta_json_file") if flag != name for word in (f"--{flag}", "x")]
    with pytest.raises(UserError, match=f"--{name}: found an empty value"):
        TrainingConfig.parse(["--config", "recipe.json", *rest])
    assert os.listdir(tmp_path) == ["recipe.json"]
