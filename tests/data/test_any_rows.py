"""Anything at all in the three JSON files: it loads, or it is a UserError."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from reweighting.errors import UserError
from tests.rows import LOADERS, VALID


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    path = tmp_path_factory.mktemp("any")
    Image.new("L", (1, 1)).save(path / "a.png")
    return path


# Half surrogate pairs among the texts: JSON can carry them.
texts = st.text(st.characters(), max_size=6) | st.sampled_from(["", "\ud800", "a\0", "a.png", "../a.png", "/", "."])
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**30), 0, 1])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated_rows(draw):
    kind = draw(st.sampled_from(list(VALID)))
    rows = [dict(row) for row in VALID[kind]]
    row = draw(st.sampled_from(rows))
    names = [*row, "sid", "ground_truth", "score", "times", "answers", "index", "image_files"]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names) | texts)
        if draw(st.booleans()):
            row[name] = draw(values | st.lists(texts, min_size=2, max_size=2))
        else:
            row.pop(name, None)
    return kind, rows


def loads_or_user_error(kind, path, root):
    try:
        rows = LOADERS[kind](path, root)
    except UserError as error:
        assert str(path) in str(error)
        str(error).encode("utf-8")
    else:
        assert [row.index for row in rows] == list(range(len(rows))) and rows
        assert all(row.model_dump_json() for row in rows)  # nothing in them that cannot be written out
        assert all(bool(row.image_path) == bool(row.image_files) for row in rows)


anything = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@anything
@given(kind=st.sampled_from(list(VALID)), value=values, root=st.booleans())
@example(kind="meta", value=[{}], root=False)
def test_any_json_value(scratch, kind, value, root):
    path = scratch / "value.json"
    path.write_text(json.dumps(value))
    loads_or_user_error(kind, path, scratch if root else None)


@anything
@given(kind=st.sampled_from(list(VALID)), data=st.binary(max_size=40), suffix=st.sampled_from(["json", "jsonl"]))
@example(kind="meta", data=b'{"a":' * 5000, suffix="jsonl")
def test_any_bytes(scratch, kind, data, suffix):
    path = scratch / f"bytes.{suffix}"
    path.write_bytes(data)
    loads_or_user_error(kind, path, None)


@anything
@given(mutated=mutated_rows(), root=st.booleans())
def test_any_change_of_valid_rows(scratch, mutated, root):
    kind, rows = mutated
    path = scratch / "rows.json"
    path.write_text(json.dumps(rows))
    loads_or_user_error(kind, path, scratch if root else None)
