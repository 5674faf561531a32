"""The images that rows name: where they are looked for, what is refused, how often each is read."""

import json
import struct
import zlib

import pytest
from PIL import Image

from reweighting.data import load_rows as records
from reweighting.data.load_rows import load_candidate_rows, load_training_rows
from reweighting.errors import UserError
from tests.rows import VALID, candidate, message, training, write


def png(width, height):
    """A PNG whose header states any size, with no pixel data behind it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT", b"IEND"]
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


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
