"""The three JSON files: what loads, and what each kind of mistake says. Run: pytest tests/test_records.py"""

import json
import struct
import subprocess
import sys
import zlib

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from reweighting import records
from reweighting.errors import UserError
from reweighting.records import (
    CandidateRow,
    MetaRow,
    TrainingRow,
    load_candidate_rows,
    load_meta_rows,
    load_training_rows,
)

LOADERS = {"training": load_training_rows, "meta": load_meta_rows, "candidate": load_candidate_rows}


def training(**changes):
    row = {"input": "How many?", "add": "Step 1: two", "image_path": None, "dataset": "A", "accuracy": 0.5}
    return row | changes


def meta(**changes):
    return {"true_false": True, "input": "How many?\nStep 1: two", "image_path": None} | changes


def candidate(**changes):
    return {"id": 7, "input": "How many?", "image_path": None, "candidates": ["two", "three"]} | changes


VALID = {
    "training": [training(), training(dataset="B")],
    "meta": [meta(), meta(true_false=False)],
    "candidate": [candidate()],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, so that messages show short relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(rows, name="rows.json"):
    with open(name, "w", encoding="utf-8") as file:
        json.dump(rows, file)
    return name


def message(load, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    return str(caught.value)


def row_problem(kind, row):
    """What is said of one wrong row after a file's valid ones, without the file and the row's index."""
    index = len(VALID[kind])
    head, *lines = message(LOADERS[kind], write([*VALID[kind], row])).split("\n")
    assert head == f"rows.json: {len(lines)} problem{'s' * (len(lines) > 1)} in {index + 1} rows"
    assert all(line.startswith(f"rows.json: row {index}: ") for line in lines)
    return "\n".join(line.removeprefix(f"rows.json: row {index}: ") for line in lines)


def png(width, height):
    """A PNG whose header states any size, with no pixel data behind it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT", b"IEND"]
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


# What loads


def test_training_rows_have_fields_image_and_index(folder):
    Image.new("RGB", (2, 3)).save("a.png")
    rows = load_training_rows(
        write(
            [
                training(image_path="a.png", id=3, sid="s", ground_truth=False, score=2, times=4, note=["own"]),
                training(image_path="", dataset="B", accuracy=1),
            ]
        )
    )
    assert [type(row) for row in rows] == [TrainingRow, TrainingRow]
    first, second = rows
    assert (first.image, first.index) == (folder.resolve() / "a.png", 0)
    assert (first.id, first.sid, first.ground_truth, first.score, first.times) == (3, "s", False, 2.0, 4.0)
    assert (second.image, second.index, second.dataset, second.accuracy) == (None, 1, "B", 1.0)
    assert second.id is None


def test_meta_and_candidate_rows(folder):
    metas = load_meta_rows(write([meta(id="m"), meta(true_false=False, input="no step")]))
    assert [(type(row), row.true_false, row.input) for row in metas] == [
        (MetaRow, True, "How many?\nStep 1: two"),
        (MetaRow, False, "no step"),
    ]
    row = candidate(answers=["2", ""], true_false=[True, False], ground_truth=2)
    (read,) = load_candidate_rows(write([row]))
    assert isinstance(read, CandidateRow)
    assert (read.candidates, read.answers, read.true_false) == (["two", "three"], ["2", ""], [True, False])


def test_json_lines_and_byte_order_mark(folder):
    odd = training(input="a\u2028b")
    lines = [json.dumps(odd, ensure_ascii=False), "", json.dumps(training(dataset="B"))]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    assert [(row.input, row.index) for row in load_training_rows("rows.jsonl")] == [
        ("a\u2028b", 0),
        ("How many?", 1),
    ]
    (folder / "rows.json").write_text(json.dumps(VALID["meta"]), encoding="utf-8-sig")
    assert len(load_meta_rows("rows.json")) == 2


def test_keys_named_like_the_loaders_own_fields_are_left_out(folder):
    (row,) = load_candidate_rows(write([candidate(index="x", image=5)]))
    assert (row.index, row.image) == (0, None)


def test_import_needs_no_torch():
    code = "import sys, reweighting.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=__file__.rsplit("/", 2)[0]).returncode == 0


# The file


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("rows.json", b"", ["no rows in it"]),
        ("rows.json", b"[]", ["no rows in it"]),
        ("rows.jsonl", b"\n \n", ["no rows in it"]),
        ("rows.json", b'[\n {"a": 1,}\n]', ["not JSON", "line 2 column 10", "json.tool"]),
        ("rows.json", b"{}\n{}", ["not JSON: Extra data at line 2 column 1", "name the file .jsonl"]),
        ("rows.jsonl", b'{}\n\n{"a" 1}', ["not JSON", "line 3 column 6"]),
        ("rows.json", b'{"rows": []}', ["found {'rows': []}, allowed: a list of objects", ".jsonl"]),
        ("rows.json", b"3", ["found 3, allowed: a list"]),
        ("rows.json", b'["ab\n\xff"]', ["not UTF-8 (line 2)", "Save it as UTF-8"]),
        ("rows.json", "[]".encode("utf-16"), ["not UTF-8 (line 1)"]),
        ("rows.json", b"[" * 100_000, ["nested too deeply"]),
        ("rows.json", b"[" + b"9" * 5_000 + b"]", ["too many digits"]),
    ],
)
def test_unreadable_content(folder, name, data, parts):
    (folder / name).write_bytes(data)
    text = message(load_meta_rows, name)
    assert text.startswith(f"{name}: ")
    for part in parts:
        assert part in text


def test_unreadable_paths(folder):
    assert message(load_meta_rows, "none.json") == "none.json: no such file. Check the path."
    (folder / "sub").mkdir()
    assert "sub: this is a folder" in message(load_meta_rows, "sub")
    assert "cannot be read (embedded null byte)" in message(load_meta_rows, "a\0b")
    assert "cannot be read (File name too long)" in message(load_meta_rows, "a" * 5000)


# The rows


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("training", training(accuracy=1.7), "accuracy: found 1.7, allowed: a number from 0 to 1"),
        ("training", training(accuracy=-0.1), "accuracy: found -0.1, allowed: a number from 0 to 1"),
        ("training", training(accuracy="0.5"), "accuracy: found '0.5', allowed: a number from 0 to 1"),
        ("training", training(accuracy=True), "accuracy: found True, allowed: a number from 0 to 1"),
        ("training", training(accuracy=None), "accuracy: found None, allowed: a number from 0 to 1"),
        ("training", training(accuracy=float("nan")), "accuracy: found nan, allowed: a number from 0 to 1"),
        ("training", training(accuracy=float("inf")), "accuracy: found inf, allowed: a number from 0 to 1"),
        ("training", training(score=float("inf")), "score: found inf, allowed: a number from 0 up, or null"),
        ("training", training(times=-1), "times: found -1, allowed: a number from 0 up, or null"),
        ("training", training(add=" \n\x1c"), r"add: found ' \n\x1c', allowed: text that is not blank"),
        ("training", training(dataset=3), "dataset: found 3, allowed: text that is not blank"),
        ("training", training(sid=1.5), "sid: found 1.5, allowed: a whole number, non-blank text, or null"),
        ("training", training(id=True), "id: found True, allowed: a whole number, non-blank text, or null"),
        (
            "training",
            training(ground_truth=[1]),
            "ground_truth: found [1], allowed: finite number, text, bool, null",
        ),
        (
            "training",
            training(ground_truth=float("nan")),
            "ground_truth: found nan, allowed: finite number",
        ),
        (
            "training",
            training(image_path=3),
            "image_path: found 3, allowed: the path of an image file, null",
        ),
        ("meta", meta(true_false=1), "true_false: found 1, allowed: true or false"),
        ("meta", meta(true_false="true"), "true_false: found 'true', allowed: true or false"),
        ("candidate", candidate(id=None), "id: found None, allowed: a whole number, or text"),
        (
            "candidate",
            candidate(candidates=[]),
            "candidates: found [], allowed: a list of texts, at least one",
        ),
        ("candidate", candidate(candidates="two"), "candidates: found 'two', allowed: a list of texts"),
        ("candidate", candidate(candidates=["a", " "]), "candidates[1]: found ' ', allowed: a list of texts"),
        (
            "candidate",
            candidate(answers=["2"]),
            "answers: found 1 of them, allowed: one per candidate, that is 2",
        ),
        (
            "candidate",
            candidate(true_false=[True] * 3),
            "true_false: found 3 of them, allowed: one per candidate",
        ),
        ("candidate", candidate(true_false=[True, 0]), "true_false[1]: found 0, allowed: a list of bools"),
        (
            "meta",
            [1, 2],
            "the row: found [1, 2], allowed: an object with the fields input, image_path, true_false",
        ),
        ("meta", None, "the row: found None, allowed: an object"),
    ],
)
def test_wrong_values(folder, kind, row, said):
    text = row_problem(kind, row)
    assert text.startswith(said)
    assert "\n" not in text


def test_every_wrong_field_of_a_row_is_named(folder):
    row = training(accuracy=2, input="", image_path="none.png")
    del row["add"]
    assert row_problem("training", row).split("\n") == [
        "input: found '', allowed: text that is not blank",
        "add: missing, allowed: text that is not blank",
        "accuracy: found 2, allowed: a number from 0 to 1",
        f"image_path: found 'none.png', which is no file in . or {folder}, "
        "allowed: an image that Pillow can read, or null",
    ]


def test_long_and_deep_values_are_shown_short(folder):
    deep = json.loads("[" * 500 + "]" * 500)
    for value in ["x" * 10_000, deep, 10**4000, {str(n): "y" * 100 for n in range(50)}]:
        text = row_problem("meta", meta(true_false=value))
        shown = text.removeprefix("true_false: found ").removesuffix(", allowed: true or false")
        assert 5 < len(shown) <= 60
    assert "accuracy: found 1000000" in row_problem("training", training(accuracy=10**400))


@pytest.mark.parametrize("field", ["input", "add", "id", "image_path", "ground_truth"])
def test_half_surrogate_pairs_are_named(folder, field):
    text = row_problem("training", training(**{field: "x" * 200 + "\ud800" + "y" * 200}))
    assert text.startswith(f"{field}: found 'xxx")
    assert "(with half of a surrogate pair in it), allowed: " in text
    text.encode("utf-8")  # the message itself can be printed


def test_misspelt_fields(folder):
    row = training(image_pth="a.png")
    del row["image_path"]
    assert row_problem("training", row) == "image_pth: unknown field, did you mean image_path?"
    text = row_problem("training", training(ground_thruth="B"))
    assert text == "ground_thruth: unknown field, did you mean ground_truth?"
    row = meta(True_False=False)
    del row["true_false"]
    assert row_problem("meta", row) == "True_False: unknown field, did you mean true_false?"
    # A column that resembles a field which is there, or a short optional one, is people's own.
    rows = [meta(input_2="x", idx=1, uid="y", category="z"), meta(true_false=False)]
    assert len(load_meta_rows(write(rows))) == 2


@pytest.mark.parametrize("count", [1, 20, 21, 137])
def test_at_most_twenty_problems_are_listed(folder, count):
    rows = [training(accuracy=9)] * count + [training()] * 10
    head, *lines = message(load_training_rows, write(rows)).split("\n")
    assert head == f"rows.json: {count} problem{'s' * (count > 1)} in {count + 10} rows"
    assert lines[min(count, 20) - 1].startswith(f"rows.json: row {min(count, 20) - 1}: accuracy: found 9")
    assert lines[20:] == ([f"... and {count - 20} more"] if count > 20 else [])


def test_one_row_is_singular(folder):
    text = message(load_candidate_rows, write([candidate(id=None)]))
    assert text.startswith("rows.json: 1 problem in 1 row\n")


# What only the whole file shows


def test_training_needs_two_domains_unless_told_otherwise(folder):
    name = write([training(), training(accuracy=0.1)])
    text = message(load_training_rows, name)
    assert text.startswith("rows.json: dataset: found only 'A', allowed: at least 2 domains")
    assert "fine-tune without reweighting" in text
    assert len(load_training_rows(name, min_domains=1)) == 2


@pytest.mark.parametrize(("value", "said"), [(True, "found 3 true and 0 false"), (False, "found 0 true and 3 false")])
def test_meta_needs_both_classes(folder, value, said):
    text = message(load_meta_rows, write([meta(true_false=value)] * 3))
    assert text.startswith(f"rows.json: true_false: {said}, allowed: at least one of each")
    assert "add rows of the other kind" in text


# The images


def image_problem(image_path, image_root=None):
    """What is said of one row with this image."""
    head, line = message(load_candidate_rows, write([candidate(image_path=image_path)]), image_root).split("\n")
    assert head == "rows.json: 1 problem in 1 row"
    prefix, suffix = (
        "rows.json: row 0: image_path: found ",
        ", allowed: an image that Pillow can read, or null",
    )
    assert line.startswith(prefix) and line.endswith(suffix)
    return line.removeprefix(prefix).removesuffix(suffix)


def image_found(image_path, image_root=None, json_name="rows.json"):
    return load_candidate_rows(write([candidate(image_path=image_path)], json_name), image_root)[0].image


def test_where_images_are_looked_for(folder):
    for name in ["data/both.png", "both.png", "here.png", "root/both.png"]:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("L", (1, 1)).save(name)
    base = folder.resolve()
    assert image_found("both.png", json_name="data/rows.json") == base / "data/both.png"
    assert image_found("here.png", json_name="data/rows.json") == base / "here.png"
    assert image_found("both.png", "root", "data/rows.json") == base / "root/both.png"
    assert image_found(str(base / "here.png"), json_name="data/rows.json") == base / "here.png"
    assert image_found(str(base / "root/both.png"), "root") == base / "root/both.png"


def test_paths_that_lead_outside_the_image_root(folder):
    (folder / "root").mkdir()
    Image.new("L", (1, 1)).save("out.png")
    (folder / "root/link.png").symlink_to(folder / "out.png")
    (folder / "root/loop.png").symlink_to("loop.png")
    root = folder.resolve() / "root"
    for path in ["../out.png", str(folder / "out.png"), "link.png", "x/../../out.png", "../root2/x.png"]:
        assert image_problem(path, "root").endswith(f", which leads outside {root}")
    assert image_problem("loop.png", "root") == f"'loop.png', which is no file in {root}"


def test_image_root_must_be_a_folder(folder):
    name = write(VALID["candidate"])
    for root in ["none", name, "a\0b"]:
        text = message(load_candidate_rows, name, root)
        assert text == f"image_root {root}: no such folder. Name the folder of the images."


def test_files_that_are_no_images(folder):
    (folder / "sub").mkdir()
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "zero.png").write_bytes(png(0, 5))
    Image.effect_noise((64, 64), 50).save("whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:-900])
    assert image_problem("none.png") == f"'none.png', which is no file in . or {folder}"
    assert image_problem("/none.png") == "'/none.png', which is no file"
    assert image_problem("sub").startswith("'sub', which is no file in ")
    assert image_problem("a\0b") == r"'a\x00b', which cannot be a path"
    assert "which is no file" in image_problem("n" * 5000)
    for name in ["text.png", "empty.png", "zero.png"]:
        assert image_problem(name) == f"'{name}', which is not an image"
    assert image_problem("cut.png").startswith("'cut.png', which cannot be decoded (OSError('image file is trunc")


def test_too_many_pixels_are_refused_before_decoding(folder, monkeypatch):
    # 12000 x 12000 is where Pillow only warns; there is no pixel data, so decoding would say something else.
    (folder / "big.png").write_bytes(png(12_000, 12_000))
    assert image_problem("big.png") == f"'big.png', which has more than {Image.MAX_IMAGE_PIXELS} pixels"
    (folder / "huge.png").write_bytes(png(60_000, 60_000))
    assert image_problem("huge.png") == f"'huge.png', which has more than {Image.MAX_IMAGE_PIXELS} pixels"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12)
    Image.new("L", (4, 3)).save("fits.png")
    assert image_found("fits.png") == folder.resolve() / "fits.png"


def test_each_file_is_decoded_once_and_reported_for_each_row(folder, monkeypatch):
    Image.new("L", (1, 1)).save("good.png")
    (folder / "bad.png").write_text("bad")
    opened = []
    pillow_open = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file.name) or pillow_open(file))
    paths = ["bad.png", "good.png", "./bad.png", "bad.png", "none.png"]
    rows = [candidate(image_path=path) for path in paths]
    head, *lines = message(load_candidate_rows, write(rows)).split("\n")
    assert sorted(opened) == ["bad.png", "good.png"]
    assert head == "rows.json: 4 problems in 5 rows"
    assert [line.split(", ")[0] for line in lines] == [
        "rows.json: row 0: image_path: found 'bad.png'",
        "rows.json: row 2: image_path: found './bad.png'",
        "rows.json: row 3: image_path: found 'bad.png'",
        "rows.json: row 4: image_path: found 'none.png'",
    ]


# Anything at all: it loads, or it is a UserError


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
    names = [*row, "sid", "ground_truth", "score", "times", "answers", "index", "image"]
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
        assert all(bool(row.image_path) == (row.image is not None) for row in rows)


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


def test_beyond_so_many_images_only_heads_are_looked_at(tmp_path, monkeypatch):
    """Decoding 200,000 photographs would take longer than many a run."""
    monkeypatch.setattr(records, "IMAGES_DECODED", 2)
    monkeypatch.setattr(records, "ROWS_AT_A_TIME", 2)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "whole.png")
    broken = (tmp_path / "whole.png").read_bytes()[:60]  # the head is there
    rows = [training(dataset=f"d{n % 2}", image_path=f"{n}.png") for n in range(4)]
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(broken if n == 3 else (tmp_path / "whole.png").read_bytes())
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert len(load_training_rows(tmp_path / "train.json")) == 4
    monkeypatch.setattr(records, "IMAGES_DECODED", 3)
    with pytest.raises(UserError, match="row 3: image_path: .*cannot be decoded"):
        load_training_rows(tmp_path / "train.json")
