"""row_files.py: wherever the chunks are cut, the rows and the errors are those of the whole file at once."""

import datetime
import gzip
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from reweighting.data import row_files
from reweighting.data.load_rows import load_training_rows
from reweighting.data.row_files import iterate_rows
from reweighting.errors import UserError
from reweighting.files import digest, regular_file
from tests.rows import VALID, message

ROWS = [
    {"a": 'text with "quotes", ], } and \\ \n', "b": [1, -2.5e-3, True, None, float("inf")]},
    {"long": "x" * 300, "é": "😀 ü"},
    -12345678901234567890,
    "bare",
    [],
    {},
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100, 10_000])
@pytest.mark.parametrize("indent", [None, 3])
def test_any_chunk_gives_the_rows(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(row_files, "CHUNK", chunk)
    for escape in (True, False):
        text = json.dumps(ROWS, indent=indent, ensure_ascii=escape)
        (tmp_path / "rows.json").write_text("\ufeff " + text + "\n", encoding="utf-8")
        assert list(iterate_rows(tmp_path / "rows.json")) == ROWS
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)))
    assert list(iterate_rows(tmp_path / "rows.jsonl")) == ROWS


@pytest.mark.parametrize("chunk", [1, 3, 10_000])
def test_other_forms_of_json_files(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(row_files, "CHUNK", chunk)
    rows = [{"a": 1}, {"b": [2]}, {"c": "]"}]
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))  # as many name JSON lines
    (tmp_path / "by_question.json").write_text(json.dumps({"q1": rows[:2], "q2": rows[2:], "q3": []}))
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": rows}, indent=1))
    for name in ("lines", "by_question", "wrapped"):
        assert list(iterate_rows(tmp_path / f"{name}.json")) == rows
    for one in ({"a": 1}, {"data": rows, "version": 1}, {"data": [1]}, {}):
        (tmp_path / "one.json").write_text(json.dumps(one))
        with pytest.raises(UserError, match="allowed: a list of objects"):
            list(iterate_rows(tmp_path / "one.json"))


@pytest.mark.parametrize(
    "text",
    ['[{"a": 1},\n {"b": 2,\n "c" 3}, {"d": 4}]', '[{"a": 1}\n {"b": 2}]', '[{"a": "cut', "[1, tru", "[1]\n 2", "[1,"],
)
def test_errors_stand_where_the_json_module_finds_them(tmp_path, monkeypatch, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    for chunk in (1, 5, 10_000):
        monkeypatch.setattr(row_files, "CHUNK", chunk)
        with pytest.raises(UserError, match=f"line {expected.value.lineno} column {expected.value.colno}"):
            list(iterate_rows(tmp_path / "rows.json"))


def test_the_memory_does_not_grow_with_the_file(tmp_path):
    def peak(rows: int) -> int:
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([{"text": "x" * 1000}] * rows))
        tracemalloc.start()
        assert sum(1 for _ in iterate_rows(path)) == rows
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(20_000) < 1.2 * peak(4_000)


def test_a_table_gives_the_rows_of_the_same_json(tmp_path):
    rows = [{"input": f"q {i}", "accuracy": i / 9, "id": i, "image_path": None if i % 2 else "a.png"} for i in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=4)
    assert list(iterate_rows(tmp_path / "rows.parquet")) == rows
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:0]), tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-9])
    for name, words in (("bad", "cannot be read"), ("none", "no rows in it"), ("absent", "no such file")):
        with pytest.raises(UserError, match=f"{name}.parquet.*{words}"):
            list(iterate_rows(tmp_path / f"{name}.parquet"))


def test_only_the_known_columns_of_a_table_are_read(folder):
    """The others may be of any type and size: nanoseconds have no Python form, images would fill the memory."""
    rows = VALID["training"]
    table = pyarrow.Table.from_pylist(rows)
    nanoseconds = pyarrow.array([1, 2], pyarrow.timestamp("ns"))
    dates = pyarrow.array([datetime.date(1, 1, 1)] * 2)
    images = pyarrow.array([{"bytes": b"x" * 1000}] * 2)
    for name, column in (("time", nanoseconds), ("day", dates), ("image", images), ("wert", dates)):
        table = table.append_column(name, column)
    pyarrow.parquet.write_table(table, "rows.parquet")
    assert [row.add for row in load_training_rows("rows.parquet")] == [row["add"] for row in rows]
    assert list(iterate_rows(Path("rows.parquet"), columns=["add"]))[0] == dict.fromkeys(table.column_names) | {
        "add": rows[0]["add"]
    }
    renamed = table.rename_columns(["Input" if name == "input" else name for name in table.column_names])
    pyarrow.parquet.write_table(renamed, "rows.parquet")
    assert "Input: unknown field, did you mean input?" in message(load_training_rows, "rows.parquet")


def test_gzip_is_read_and_other_files_are_named(folder):
    text = json.dumps(VALID["training"])
    lines = "\n".join(map(json.dumps, VALID["training"]))
    for name, content in (("rows.json.gz", text), ("rows.json", text), ("rows.jsonl.gz", lines), ("rows.jsonl", lines)):
        (folder / name).write_bytes(gzip.compress(content.encode()))
        assert list(iterate_rows(Path(name))) == VALID["training"]
    (folder / "cut.json").write_bytes(gzip.compress(text.encode() * 100)[:-20])
    (folder / "bad.json").write_bytes(b"\x1f\x8b" + b"no gzip")
    (folder / "latin.json.gz").write_bytes(gzip.compress(b'["a",\n "\xff"]'))
    (folder / "rows.zip").write_bytes(b"PK\x03\x04...")
    (folder / "table.json").write_bytes(b"PAR1...")
    for name, words in (("cut.json", "cannot be read"), ("bad.json", "cannot be read"), ("rows.zip", "a zip archive"),
                        ("table.json", "a Parquet file"), ("latin.json.gz", "not UTF-8 (line 2)")):  # fmt: skip
        text = message(lambda name=name: list(iterate_rows(Path(name))))
        assert text.startswith(f"{name}: ") and words in text and "\n" not in text


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "fifo"])
def test_what_is_no_regular_file_is_refused_at_once(folder, place):
    os.mkfifo("fifo")
    kind = "a FIFO" if place == "fifo" else "a device"
    for read in (lambda: list(iterate_rows(Path(place))), lambda: digest(Path(place))):
        assert message(read).startswith(f"{place}: this is {kind}, not a regular file. Name a file, or a pipe of")


def through_pipe(content: bytes) -> tuple[Path, int, threading.Thread]:
    """What `<(…)` gives a command: a name and a descriptor of a pipe through which the content comes."""
    out, into = os.pipe()

    def fill():
        with open(into, "wb") as pipe:
            pipe.write(content)

    writer = threading.Thread(target=fill)
    writer.start()
    return Path(f"/dev/fd/{out}"), out, writer


@pytest.mark.parametrize("form", ["list", "lines", "gzip"])
def test_a_pipe_of_the_shell_is_read_once_for_its_rows_and_its_digest(folder, form):
    text = json.dumps(VALID["training"])
    if form == "lines":
        text = "\n".join(map(json.dumps, VALID["training"]))
    content = gzip.compress(text.encode()) if form == "gzip" else text.encode()
    (folder / "rows").write_bytes(content)
    path, descriptor, writer = through_pipe(content)
    try:
        assert len(load_training_rows(path)) == len(load_training_rows(path)) == 2
        assert digest(path) == digest(Path("rows"))
        assert regular_file(path) != path and regular_file(Path("rows")) == Path("rows")
    finally:
        os.close(descriptor)
        writer.join()


def test_the_copy_of_a_pipe_is_gone_when_the_process_ends(folder):
    code = "import sys; from reweighting.files import regular_file; print(regular_file(sys.argv[1]))"
    root = Path(__file__).resolve().parents[2]
    command = f"{sys.executable} -c '{code}' <(echo '[]')"
    found = subprocess.run(["bash", "-c", command], env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True)
    assert found.returncode == 0, found.stderr
    copy = Path(found.stdout.decode().strip())
    assert copy.is_absolute() and not copy.exists()
