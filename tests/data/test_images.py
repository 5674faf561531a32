"""The images that rows name: where they are looked for, what is refused, how often each is read."""

import io
import itertools
import json
import os
import struct
import subprocess
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from reweighting.data import row_images
from reweighting.data.chains import candidate_chains
from reweighting.data.images import image_size, open_image
from reweighting.data.load_rows import load_candidate_rows, load_training_rows
from reweighting.errors import UnreadableImage, UserError
from tests.data.test_chains import chain_tokenizer
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
        ", allowed: an image (JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, JPEG2000, AVIF), or null",
    )
    assert line.startswith(prefix) and line.endswith(suffix)
    return line.removeprefix(prefix).removesuffix(suffix)


def image_found(image_path, image_root=None, json_name="rows.json"):
    return load_candidate_rows(write([candidate(image_path=image_path)], json_name), image_root)[0].image_files[0]


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
    monkeypatch.setattr(Image, "open", lambda file, **rest: opened.append(file.name) or pillow_open(file, **rest))
    paths = ["bad.png", "good.png", "./bad.png", "bad.png", "none.png"]
    rows = [candidate(image_path=path) for path in paths]
    head, *lines = message(load_candidate_rows, write(rows)).split("\n")
    assert sorted(opened) == ["bad.png", "good.png"]
    assert head == "rows.json: 4 problems in 5 rows"
    assert [line.split(", ")[0] for line in lines] == [
        "rows.json: row 0: image_path: found 'bad.png'",
        "rows.json: row 4: image_path: found 'none.png'",
    ]
    assert lines[0].endswith("(likewise row 2; row 3)")


def test_beyond_so_many_images_only_heads_are_looked_at(tmp_path, monkeypatch):
    """Decoding 200,000 photographs would take longer than many a run."""
    monkeypatch.setattr(row_images, "IMAGES_DECODED", 2)
    monkeypatch.setattr(row_images, "ROWS_AT_A_TIME", 2)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "whole.png")
    broken = (tmp_path / "whole.png").read_bytes()[:60]  # the head is there
    rows = [training(dataset=f"d{n % 2}", image_path=f"{n}.png") for n in range(4)]
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(broken if n == 3 else (tmp_path / "whole.png").read_bytes())
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert len(load_training_rows(tmp_path / "train.json")) == 4
    monkeypatch.setattr(row_images, "IMAGES_DECODED", 3)
    with pytest.raises(UserError, match="row 3: image_path: .*cannot be decoded"):
        load_training_rows(tmp_path / "train.json")


# ---------------------------------------------------------------- what the check accepts, the run reads

ORIENTATION = 274


def exif_bytes(orientation):
    """The EXIF block of an orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif.tobytes()


# XResolution 72 / 0: writing such a block anew, as turning a picture by Pillow's own helper does, fails.
ZERO_DENOMINATOR = (
    b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0)
    + struct.pack(">HHII", 282, 5, 1, 38) + struct.pack(">III", 0, 72, 0)
)  # fmt: skip
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'

exif_blocks = st.one_of(
    st.integers(0, 9).map(exif_bytes),
    st.just(ZERO_DENOMINATOR),
    st.binary(max_size=40),
    st.binary(max_size=40).map(lambda noise: b"Exif\0\0MM\0*\0\0\0\x08" + noise),
    st.tuples(st.integers(1, 8).map(exif_bytes), st.integers(6, 30)).map(lambda cut: cut[0][: cut[1]]),
)
modes = st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"])
formats = st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "EPS"])


def with_late_chunk(data, kind, content):
    """A PNG with another chunk behind its pixels."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:-12] + chunk + data[-12:]


@st.composite
def image_files(draw):
    """The bytes of an image file, whole or a little damaged."""
    image = Image.new(draw(modes), (draw(st.integers(1, 60)), draw(st.integers(1, 60))))
    kind, block = draw(formats), draw(exif_blocks)
    extra = {"exif": block} if draw(st.booleans()) else {}
    if kind in ("JPEG", "WEBP", "AVIF", "TIFF") and draw(st.booleans()):
        extra["xmp"] = XMP
    file = io.BytesIO()
    try:
        image.save(file, kind, **extra)
    except Exception:  # this format has no such mode, or refuses the block
        file = io.BytesIO()
        image.convert("RGB").save(file, kind)
    data = file.getvalue()
    if kind == "PNG" and draw(st.booleans()):
        late = draw(
            st.sampled_from(
                [(b"eXIf", block.removeprefix(b"Exif\0\0")), (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)]
            )
        )
        data = with_late_chunk(data, *late)
    if draw(st.booleans()) and draw(st.booleans()):
        place = draw(st.integers(0, len(data) - 1))
        data = data[:place] + draw(st.binary(max_size=3)) + data[place + draw(st.integers(0, 3)) :]
    return data


@pytest.fixture(scope="module")
def tokenizers():
    return {side: chain_tokenizer(max_image_side=side) for side in (None, 25)}


numbers = itertools.count()


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=image_files(), max_side=st.sampled_from([None, 25]))
def test_whatever_the_check_accepts_the_run_reads(folder, tokenizers, data, max_side):
    name = f"{next(numbers)}.png"  # a new one each time: sizes are remembered by path
    (folder / name).write_bytes(data)
    write([candidate(image_path=name)])
    try:
        (row,) = load_candidate_rows("rows.json")
    except UserError as error:
        assert "\n" not in str(error).partition("\n")[2]
        with pytest.raises(UnreadableImage):
            open_image(folder / name)
        return
    image = open_image(row.image_files[0], max_side)
    assert image.mode == "RGB" and image.size == image_size(row.image_files[0], max_side)
    chain = candidate_chains(row)[0]
    try:
        tokenizers[max_side].check(chain)
    except UserError as error:
        assert "image" in str(error)  # too narrow for the backbone: known before the run
    else:
        tokenizers[max_side].encode(chain)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "late PNG", "WEBP", "TIFF", "AVIF"])
def test_pictures_are_turned_as_their_orientation_says(tmp_path, kind, orientation):
    image = Image.new("RGB", (48, 32), "white")
    image.paste("red", (0, 0, 24, 16))
    upright = ImageOps.exif_transpose(image_with_orientation(image, orientation))
    file = io.BytesIO()
    if kind == "late PNG":
        image.save(file, "PNG")
        (tmp_path / "a").write_bytes(with_late_chunk(file.getvalue(), b"eXIf", exif_bytes(orientation)[6:]))
    else:
        image.save(tmp_path / "a", kind, exif=exif_bytes(orientation), quality=95)
    opened = open_image(tmp_path / "a")
    assert opened.size == upright.size == image_size(tmp_path / "a")
    assert image_size(tmp_path / "a", 24) == open_image(tmp_path / "a", 24).size
    for x, y in ((8, 8), (opened.width - 8, 8), (8, opened.height - 8), (opened.width - 8, opened.height - 8)):
        assert all(abs(a - b) < 40 for a, b in zip(opened.getpixel((x, y)), upright.getpixel((x, y)), strict=True))


def image_with_orientation(image, orientation):
    turned = image.copy()
    turned.getexif()[ORIENTATION] = orientation
    return turned


def test_a_picture_whose_exif_cannot_be_read_is_taken_unturned(folder):
    Image.new("RGB", (20, 10)).save("bad.jpg", exif=b"Exif\0\0MM\0*garbage and more of it")
    Image.new("RGB", (20, 10)).save("zero.jpg", exif=ZERO_DENOMINATOR)
    assert open_image(image_found("bad.jpg")).size == image_size("bad.jpg") == (20, 10)
    assert open_image(image_found("zero.jpg")).size == image_size("zero.jpg") == (10, 20)  # the orientation is there


def test_formats_that_start_other_programs_are_not_opened(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("Ghostscript"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("Ghostscript"))
    Image.new("RGB", (8, 8)).save("a.eps")
    (folder / "a.eps").rename("a.png")
    assert image_problem("a.png") == "'a.png', which is not an image"
    with pytest.raises(UnreadableImage, match="is not an image"):
        open_image("a.png")
    with pytest.raises(UnreadableImage, match="is not an image"):
        image_size("a.png")


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "fifo", "."])
def test_only_regular_files_are_read_as_images(folder, place):
    os.mkfifo("fifo")
    for read in (open_image, image_size):
        with pytest.raises(UnreadableImage, match="is no regular file"):
            read(place)
    assert "which is no file" in image_problem(place)
