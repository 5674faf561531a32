"""Anything at all anywhere in a row of any format: it is read, left out and counted, or a UserError."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from reweighting.data.load_answers import LoadReport, iterate_answers
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source
from reweighting.errors import UserError

FILES = sorted((Path(__file__).parent / "files").iterdir())
ROWS = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in FILES}
texts = st.text(st.characters(), max_size=5) | st.sampled_from(["", "\ud800", "ки", "+", "Step 1: a", "a.png", "a\0"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([0, 1, -1, 10**400]) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    path = tmp_path_factory.mktemp("any")
    Image.new("L", (1, 1)).save(path / "a.png")
    return path


@st.composite
def changed_rows(draw):
    """A row of some format with a value put, or taken out, at some depth."""
    name = draw(st.sampled_from(list(ROWS)))
    row = json.loads(json.dumps(draw(st.sampled_from(ROWS[name]))))
    place = row
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return name, row
        key = draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or draw(st.booleans()):
            break
        place = place[key]
    if draw(st.booleans()):
        place[key] = draw(values)
    else:
        del place[key]
    return name, row


@settings(
    max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(changed_rows())
def test_any_change_of_a_row(scratch, changed):
    name, row = changed
    path = scratch / "rows.json"
    path.write_text(json.dumps([row]))
    report = LoadReport()
    source = Source(str(path), format=name)
    try:
        answers = list(iterate_answers(source, None, ReadingOptions(), report))
    except UserError as error:
        assert str(path) in str(error)
        str(error).encode("utf-8")
        return
    assert answers or report.left_out
    for answer in answers:
        assert answer.question.strip() and answer.steps and all(step.strip() for step in answer.steps)
        assert len(answer.labels) == len(answer.steps)
        assert all(label is None or 0 <= label <= 1 for label in answer.labels)
        assert answer.correct() in (True, False, None) and isinstance(answer.domain, str)
