"""load_rows.py and schema.py: what loads, and the message of each kind of mistake."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from reweighting.data.load_rows import load_candidate_rows, load_meta_rows, load_training_rows
from reweighting.data.schema import CandidateRow, MetaRow, TrainingRow
from reweighting.errors import Problems
from tests.rows import LOADERS, VALID, candidate, message, meta, training, write


def row_problem(kind, row):
    """What is said of one wrong row after a file's valid ones, without the file and the row's index."""
    index = len(VALID[kind])
    head, *lines = message(LOADERS[kind], write([*VALID[kind], row])).split("\n")
    assert head == f"rows.json: {len(lines)} problem{'s' * (len(lines) > 1)} in {index + 1} rows"
    assert all(line.startswith(f"rows.json: row {index}: ") for line in lines)
    return "\n".join(line.removeprefix(f"rows.json: row {index}: ") for line in lines)


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
    assert (first.image_files, first.index) == ((folder.resolve() / "a.png",), 0)
    assert (first.id, first.sid, first.ground_truth, first.score, first.times) == (3, "s", False, 2.0, 4.0)
    assert (second.image_files, second.index, second.dataset, second.accuracy) == ((), 1, "B", 1.0)
    assert second.id is None


def test_images_are_one_a_list_or_none(folder):
    for name in "ab":
        Image.new("RGB", (2, 3)).save(f"{name}.png")
    a, b = (folder.resolve() / name for name in ("a.png", "b.png"))
    for given, files in [
        ("a.png", (a,)), (["b.png"], (b,)), (["b.png", "a.png", "b.png"], (b, a, b)), (["a.png", None, ""], (a,)),
        ([], ()), ([None], ()), ("", ()), (None, ()),
    ]:  # fmt: skip
        rows = [training(image_path=given), training(image_path=given, dataset="B")]
        assert [row.image_files for row in load_training_rows(write(rows))] == [files] * 2, given
    rows = [
        meta(image_path=["a.png", "b.png"], input="<image> or <image>?\nStep 1: the <image>"),
        meta(true_false=False),
    ]
    assert load_meta_rows(write(rows))[0].image_files == (a, b)
    (row,) = load_candidate_rows(write([candidate(image_path=["b.png", "a.png"])]))
    assert row.image_files == (b, a)
    wrong = training(image_path=["a.png", 7])
    assert row_problem("training", wrong).startswith("image_path: found 7, allowed: a path, a data URI, base64")
    missing = training(image_path=["a.png", "c.png"])
    assert row_problem("training", missing).startswith("image_path: found 'c.png', which is no file in")


@pytest.mark.parametrize("kind", LOADERS)
def test_placeholders_that_do_not_fit_the_images(folder, kind):
    Image.new("RGB", (2, 3)).save("a.png")
    step = "\nStep 1: two" * (kind == "meta")
    for images, text in ((None, "for 0 images"), (["a.png"] * 3, "for 3 images"), ("a.png", "for 1 image")):
        row = VALID[kind][0] | {"input": f"Is <image> in <image>?{step}", "image_path": images}
        assert row_problem(kind, row).startswith(f"input: found 2 `<image>` {text}, allowed: one `<image>` for each")
    row = VALID[kind][0] | {"input": f"Is <image> in <image>?{step}", "image_path": ["a.png", "a.png"]}
    assert LOADERS[kind](write([*VALID[kind], row]))[-1].image_files == (folder.resolve() / "a.png",) * 2


def test_accuracy_agrees_with_its_counts_or_comes_from_them(folder):
    agree = [training(accuracy=0.67, score=2, times=3), training(accuracy=0.66, score=2, times=3, dataset="B")]
    nothing = [training(score=0, times=0), training(score=None, times=3), training(score=3)]
    without = [training(score=1, times=4, accuracy=None), training(score=3, times=4)]
    del without[1]["accuracy"]
    rows = load_training_rows(write(agree + nothing + without))
    assert [row.accuracy for row in rows] == [0.67, 0.66, 0.5, 0.5, 0.5, 0.25, 0.75]
    for counts in ({"score": 5, "times": 4}, {"score": 10**400, "times": 3}, {"score": 1, "times": 0}):
        row = training(**counts)
        del row["accuracy"]
        assert row_problem("training", row).startswith("accuracy: ")


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
    (row,) = load_candidate_rows(write([candidate(index="x", image_files=5)]))
    assert (row.index, row.image_files) == (0, ())


def test_import_needs_no_torch():
    code = "import sys, reweighting.data.load_rows; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=__file__.rsplit("/", 3)[0]).returncode == 0


# The file


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("rows.json", b"", ["no rows in it"]),
        ("rows.json", b"[]", ["no rows in it"]),
        ("rows.jsonl", b"\n \n", ["no rows in it"]),
        ("rows.json", b'[\n {"a": 1,}\n]', ["not JSON", "line 2 column 10", "json.tool"]),
        ("rows.json", b"{}\n3", ["not JSON: Extra data at line 2 column 1", "name the file .jsonl"]),
        ("rows.jsonl", b'{}\n\n{"a" 1}', ["not JSON", "line 3 column 6"]),
        ("rows.json", b'{"rows": []}', ["found {'rows': []}, allowed: a list of objects", ".jsonl"]),
        ("rows.json", b"3", ["found 3, allowed: a list"]),
        ("rows.json", b'["ab\n\xff"]', ["not UTF-8 (line 2)", "Save it as UTF-8"]),
        ("rows.json", "[]".encode("utf-16"), ["not UTF-8 (line 1)"]),
        ("rows.json", b"[" * 100_000, ["nested too deeply"]),
        ("rows.json", b"[{},\n\n " + b"9" * 5_000 + b"]", ["line 3: a number with too many digits"]),
        ("rows.jsonl", b"{}\n" + b"9" * 5_000, ["line 2: a number with too many digits"]),
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
        (
            "training",
            training(accuracy=0.9, score=1, times=4),
            "times: found 4 beside a score of 1, whose quotient is 0.25, and an accuracy of 0.9, allowed: equal ones",
        ),
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
            "image_path: found 3, allowed: the path of an image file, a list of paths, null",
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
        "allowed: an image (JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, JPEG2000, AVIF), or null",
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
    allowed = text.partition("(with half of a surrogate pair in it), allowed: ")[2]
    assert allowed and "codec" not in allowed
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


def test_the_same_problem_in_many_rows_is_one_line(folder):
    rows = [training(accuracy=9 + n, image_path=f"{n}.png") for n in range(137)] + [training()] * 10
    head, *lines = message(load_training_rows, write(rows)).split("\n")
    assert head == "rows.json: 274 problems in 147 rows"
    assert [line.partition(", allowed")[0] for line in lines] == [
        "rows.json: row 0: accuracy: found 9",
        f"rows.json: row 0: image_path: found '0.png', which is no file in . or {folder}",
    ]
    assert all(line.endswith("(likewise row 1; row 2; row 3; row 4 and 132 more)") for line in lines)


@pytest.mark.parametrize("count", [1, 20, 21, 137])
def test_at_most_twenty_kinds_of_problems_are_listed(count):
    found = Problems()
    for n in range(count):
        found.add(f"row {n}", f"text {n}")
    assert len(found.lines()) == min(count, 20) + (count > 20) and found.count == count
    assert found.lines()[20:] == ([f"... and {count - 20} more"] if count > 20 else [])


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
