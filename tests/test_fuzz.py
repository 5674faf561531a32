"""Whatever stands in the files: a run either trains or ends with the clear error, never with a traceback."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reweighting.errors import UserError
from reweighting.main import main
from tests.tiny import tiny_backbone

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**400, -1, 0.5, 1e308, float("nan"), float("inf"), "0.5", "\x00", "\ud800", "", "Step 1: a"]),
    st.floats(),
    st.text(max_size=20),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
                      max_leaves=6)  # fmt: skip
FIELDS = st.sampled_from(["id", "sid", "input", "add", "ground_truth", "image_path", "dataset", "score", "times",
                          "accuracy", "true_false", "other"])  # fmt: skip
# What is done to one row, or to the bytes of the file.
ROW_EDITS = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 39), FIELDS, VALUES),
    st.tuples(st.just("delete"), st.integers(0, 39), FIELDS),
    st.tuples(st.just("replace"), st.integers(0, 39), VALUES),
    st.tuples(st.just("repeat"), st.integers(0, 39)),
)
BYTE_EDITS = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("recode"), st.sampled_from(["utf-8-sig", "utf-16", "latin-1"])),
)


def edit_rows(rows: list, edits: list[tuple]) -> list:
    """The rows after the edits, in order."""
    for kind, place, *rest in edits:
        place %= len(rows)
        if kind == "replace":
            rows[place] = rest[0]
        elif kind == "repeat":
            rows.insert(place, rows[place])
        elif isinstance(rows[place], dict):
            rows[place] = dict(rows[place])
            if kind == "set":
                rows[place][rest[0]] = rest[1]
            else:
                rows[place].pop(rest[0], None)
    return rows


def edit_bytes(text: bytes, edits: list[tuple]) -> bytes:
    """The file after the edits, in order."""
    for kind, what, *rest in edits:
        if kind == "cut":
            text = text[: int(what * len(text))]
        elif kind == "insert":
            at = int(what * len(text))
            text = text[:at] + rest[0] + text[at:]
        else:
            text = text.decode("utf-8", "replace").encode(what, "replace")
    return text


@pytest.fixture(scope="module")
def outcomes():
    """Counts of what came out, to see that the test met both."""
    counts = {"trained": 0, "refused": 0}
    yield counts
    assert min(counts.values()) > 3, counts


@settings(max_examples=30, deadline=None, derandomize=True)
@given(name=st.sampled_from(["train.json", "meta.json"]), edits=st.lists(ROW_EDITS, max_size=2),
       after=st.lists(BYTE_EDITS, max_size=1))  # fmt: skip
def test_any_file_trains_or_is_refused(demo, outcomes, name, edits, after):
    with TemporaryDirectory() as folder:
        place = Path(folder)
        for file, count in (("train.json", 40), ("meta.json", 8)):
            rows = [row for row in json.loads((demo / file).read_text()) if row.get("dataset") in (None, "dice", "map")]
            rows = edit_rows(rows[:count], edits if file == name else [])
            text = json.dumps(rows).encode()
            (place / file).write_bytes(edit_bytes(text, after if file == name else []))
        run = ["--train_json_file", str(place / "train.json"), "--meta_json_file", str(place / "meta.json")]
        run += ["--image_root", str(demo), "--weights_path", str(place / "out"), "--reward_model", str(tiny_backbone())]
        run += ["--iteration_num", "2", "--unroll_steps", "2", "--batch_size", "2", "--meta_batch_size", "2"]
        try:
            main(run)
            outcomes["trained"] += 1
        except UserError as error:
            assert str(error)
            outcomes["refused"] += 1
        shutil.rmtree(place / "out", ignore_errors=True)
