"""row_stream.py: wherever the chunks are cut, the rows and the errors are those of the whole file at once."""

import json
import tracemalloc

import pytest

from reweighting.data import row_files as row_stream
from reweighting.data.row_files import iterate_rows
from reweighting.errors import UserError

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
    monkeypatch.setattr(row_stream, "CHUNK", chunk)
    for escape in (True, False):
        text = json.dumps(ROWS, indent=indent, ensure_ascii=escape)
        (tmp_path / "rows.json").write_text("\ufeff " + text + "\n", encoding="utf-8")
        assert list(iterate_rows(tmp_path / "rows.json")) == ROWS
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)))
    assert list(iterate_rows(tmp_path / "rows.jsonl")) == ROWS


@pytest.mark.parametrize(
    "text",
    ['[{"a": 1},\n {"b": 2,\n "c" 3}, {"d": 4}]', '[{"a": 1}\n {"b": 2}]', '[{"a": "cut', "[1, tru", "[1]\n 2", "[1,"],
)
def test_errors_stand_where_the_json_module_finds_them(tmp_path, monkeypatch, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    for chunk in (1, 5, 10_000):
        monkeypatch.setattr(row_stream, "CHUNK", chunk)
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
    import pyarrow
    import pyarrow.parquet

    rows = [{"input": f"q {i}", "accuracy": i / 9, "id": i, "image_path": None if i % 2 else "a.png"} for i in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=4)
    assert list(iterate_rows(tmp_path / "rows.parquet")) == rows
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:0]), tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-9])
    for name, words in (("bad", "cannot be read"), ("none", "no rows in it"), ("absent", "no such file")):
        with pytest.raises(UserError, match=f"{name}.parquet.*{words}"):
            list(iterate_rows(tmp_path / f"{name}.parquet"))
