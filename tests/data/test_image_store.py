"""image_store.py: images as paths, bytes, data URIs and base64."""

import base64
import gc
import io
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from reweighting.data import row_files
from reweighting.data.image_store import ImageStore, default_folder
from reweighting.data.load_answers import LoadReport, iterate_answers
from reweighting.data.load_rows import load_meta_rows
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source


def png(color: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((40, 40), 50).convert("RGB").save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "images")


def test_paths(store):
    assert store.reference("a/b.png") == "a/b.png"
    assert store.reference("file:///a/b%20c.png") == "/a/b c.png"
    assert store.reference("a\\b.png") == "a/b.png" and store.reference("/a/odd\\name.png") == "/a/odd\\name.png"
    assert store.reference({"bytes": None, "path": "a.png"}) == "a.png"
    assert store.reference("/tmp/" + "A" * 2000) == "/tmp/" + "A" * 2000  # a long path, no image
    for url in ("https://x.org/a.png", "s3://bucket/a.png"):
        with pytest.raises(ValueError, match="images are not fetched: download them first"):
            store.reference(url)
    for nothing in (None, 3, "", {"bytes": None, "path": None}, []):
        with pytest.raises(ValueError, match="a path, a data URI, base64 text"):
            store.reference(nothing)


def test_bytes_become_one_file_for_each_content(store):
    content = png()
    text = base64.b64encode(content).decode()
    forms = [content, {"bytes": content, "path": "x.png"}, f"data:image/png;base64,{text}", text]
    files = {store.reference(form) for form in forms}
    assert len(files) == 1 and isinstance((file := files.pop()), Path)
    assert file.read_bytes() == content and [path for path in store.folder.rglob("*") if path.is_file()] == [file]
    assert store.reference(png("blue")) != file
    with pytest.raises(ValueError, match="whole base64 text behind the comma"):
        store.reference("data:image/png;base64,???")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_short_base64_text_is_an_image_where_its_bytes_are_one(store, form):
    """A tiny picture takes no more characters than a path may have."""
    made = io.BytesIO()
    Image.new("RGB", (1, 1) if form != "BMP" else (4, 4)).save(made, form, **({"quality": 1} if form == "JPEG" else {}))
    content = made.getvalue()
    text = base64.b64encode(content).decode()
    assert form == "JPEG" or len(text) < 512
    assert Path(store.reference(text)).read_bytes() == content


def test_a_path_that_could_be_base64_text_stays_a_path(store):
    names = ["images", "iVBORw0KGgo", base64.b64encode(b"BM" + bytes(40)).decode(), "9j/4AAQSkZJRg", "AAAA", "R0lG"]
    assert [store.reference(name) for name in names] == names


def test_the_folder_of_the_images(monkeypatch, tmp_path):
    monkeypatch.setenv("DREAMPRM_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "images"
    monkeypatch.delenv("DREAMPRM_CACHE")
    assert default_folder() == Path.home() / ".cache" / "dreamprm" / "images"


def test_images_in_rows_of_any_kind(folder, monkeypatch):
    monkeypatch.setenv("DREAMPRM_CACHE", "cache")
    content = png()
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    (folder / "root").mkdir()
    canonical = [{"question": "q", "steps": ["a"], "images": [{"bytes": content, "path": None}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(canonical), "rows.parquet")
    (answer,) = iterate_answers(Source("rows.parquet"), "root", ReadingOptions(), LoadReport())  # in no root
    assert answer.images[0].read_bytes() == content
    meta = [{"input": "q\nStep 1: a", "true_false": right, "image_path": uri} for right in (True, False)]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert {row.image_files for row in load_meta_rows("meta.json")} == {answer.images}


def test_memory_does_not_grow_with_images_in_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMPRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(row_files, "TABLE_BYTES", 2**20)

    schema = pyarrow.schema(
        [
            ("question", pyarrow.string()),
            ("steps", pyarrow.list_(pyarrow.string())),
            ("images", pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))),
        ]
    )

    def peak(rows: int) -> int:
        path, content = tmp_path / f"{rows}.parquet", png()
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for start in range(0, rows, 50):
                block = [
                    {
                        "question": "q",
                        "steps": ["a"],
                        "images": [{"bytes": content + b"%06d" % i * 10_000, "path": None}],
                    }
                    for i in range(start, start + 50)
                ]
                writer.write_table(pyarrow.Table.from_pylist(block, schema))
        gc.collect()
        tracemalloc.start()
        answers = iterate_answers(Source(str(path)), None, ReadingOptions(), LoadReport(), decode=False)
        assert sum(1 for _ in answers) == rows
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(50)  # what is loaded once
    assert peak(600) - peak(300) < 300 * 5_000  # bytes: the images' names, while an image has 60,000
