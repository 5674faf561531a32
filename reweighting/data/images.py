"""Image files as the models take them: upright, RGB, not too large.

    image = open_image("images/0001.jpg", max_side=512)   # a PIL image
    width, height = image_size("images/0001.jpg", 512)    # its size, without decoding it

The check of the rows decodes images with the same function as the run, so it accepts what the run can read.
"""

import io
import os
import stat
import struct
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import cast

from PIL import ExifTags, Image, UnidentifiedImageError

from reweighting.errors import UnreadableImage
from reweighting.terminal import printable

# Opened by name: Pillow would also run Ghostscript on a file that is EPS inside, whatever its name is.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
IMAGE_THREADS = 4

# The turn that an EXIF orientation asks for; 1 and whatever else stands there ask for none.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ON_ITS_SIDE = (5, 6, 7, 8)

# Both hold for all threads, so they stand here: registering Pillow's formats in several threads is a race, and so are
# filters set for a while. Pillow warns of images that `_decode` refuses, and of metadata that does not matter here.
Image.init()
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(image: Path | str | Image.Image, max_side: int | None = None) -> Image.Image:
    """Open an image as upright RGB, transparency laid over white.

    Args:
        image: a file, or a PIL image.
        max_side: shrink it to at most this many pixels on its longest side; None: never.

    Returns:
        A PIL image of mode RGB.

    Raises:
        UnreadableImage: the file is missing or no readable image.
    """
    decoded = _decode(image)
    if isinstance(decoded, str):
        raise UnreadableImage(f"the image {printable(image, one_line=True)} {decoded}")
    size = shrunk_size(decoded.size, max_side)
    return decoded if size == decoded.size else decoded.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def image_size(file: Path | str, max_side: int | None = None) -> tuple[int, int]:
    """Return the width and height that `open_image` gives, in pixels, mostly from the file's header alone.

    Raises:
        UnreadableImage: the file is missing or no readable image, as far as its header tells.
    """
    try:
        with _opened(file) as image:
            if image.format != "TIFF" and not (image.format == "PNG" and _has_late_chunks(file)):
                width, height = image.size
                upright = (height, width) if _orientation(image) in ON_ITS_SIDE else (width, height)
                return shrunk_size(upright, max_side)
    except Exception as error:  # as in `_decode`
        raise UnreadableImage(f"the image {printable(file, one_line=True)} {_reason(error)}") from error
    return open_image(file, max_side).size  # only decoding it shows how it is turned


def has_image_header(content: bytes) -> bool:
    """Return whether these bytes begin as an image that can be read."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS):
            return True
    except Exception:  # Pillow's readers raise many kinds for bytes that are none
        return False


def shrunk_size(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """Return the width and height of an image once its longest side has at most `max_side` pixels."""
    if max_side is None or max(size) <= max_side:
        return size
    width, height = (max(1, round(side * max_side / max(size))) for side in size)
    return width, height


def check_images(
    names: Iterable[str], json_folder: Path, root: Path | None, decode: bool
) -> dict[str, tuple[Path | None, str]]:
    """Find the images that rows name, and decode each file once.

    Args:
        names: values of `image_path`, not blank.
        json_folder: the folder of the rows' file.
        root: the folder that all images must be in; None: look beside the rows' file, then in the working folder.
        decode: whether to decode them, or only to see whether they are there.

    Returns:
        For each name its file with symlinks resolved and "", or None and what is wrong: "is not an image".
    """
    located = {name: locate_image(name, json_folder, root) for name in dict.fromkeys(names)}
    files = list(dict.fromkeys(file for file, _ in located.values() if file)) if decode else []
    with ThreadPoolExecutor(IMAGE_THREADS) as pool:
        problems = dict(zip(files, pool.map(_problem, files), strict=True))
    for name, (file, _) in located.items():
        if problem := problems.get(file):
            located[name] = None, problem
    return located


def locate_image(name: str, json_folder: Path, root: Path | None) -> tuple[Path | None, str]:
    """Find one image as `check_images` does: its file and "", or None and why there is none."""
    folders = list(dict.fromkeys([json_folder, Path.cwd()])) if root is None else [root]
    try:
        for folder in folders:
            file = _resolved(os.path.join(folder, name))
            if root is not None and not Path(file).is_relative_to(root):
                return None, f"leads outside {root}"
            if os.path.isfile(file):
                return Path(file), ""
    except ValueError:  # a NUL character, or one that file names cannot hold
        return None, "cannot be a path"
    where = "" if os.path.isabs(name) else " in " + " or ".join(map(str, folders))
    return None, f"is no file{where}"


def _resolved(path: str) -> str:
    """As os.path.realpath, which asks for every folder on the way each time. Raises ValueError for what is no path."""
    folder, name = os.path.split(path)
    try:
        plain = stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        plain = False
    folder = os.path.join(os.getcwd(), folder)  # which may change
    return os.path.join(_resolved_folder(folder), name) if plain else os.path.realpath(path)


@lru_cache(maxsize=1024)
def _resolved_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _problem(file: Path) -> str:
    """What keeps an image file from being read, "" if nothing does."""
    decoded = _decode(file)
    return decoded if isinstance(decoded, str) else ""


def _decode(source: Path | str | Image.Image) -> Image.Image | str:
    """The whole image as upright RGB, or what is wrong with it: "is not an image"."""
    try:
        if isinstance(source, Image.Image):
            return _as_rgb(source)
        with _opened(source) as image:
            image.load()
            return _as_rgb(image)
    except Exception as error:  # Pillow raises a dozen kinds for broken files, SyntaxError among them
        return _reason(error)


def _opened(file: Path | str) -> Image.Image:
    """The image with its header read."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise _Refused("is no regular file")  # reading a device may never end
    image = Image.open(file, formats=FORMATS)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        image.close()
        raise Image.DecompressionBombError
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    """A decoded image, upright and as RGB."""
    if 0 in image.size:
        raise _Refused("has no pixels")
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F" or image.mode.startswith("I"):  # a plain convert() would clip what is above 255 to white
        image = image.convert("F")
        _, brightest = cast(tuple[float, float], image.getextrema())  # of one band
        scale = 255 if brightest <= 1 else 1 if brightest <= 255 else 1 / 257  # of [0, 1], 8 or 16 bits
        image = image.point(lambda value: value * scale + 0).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, which is upright, where none can be read."""
    try:
        # A PNG's own `getexif` would decode it first, in search of an orientation behind its pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        return orientation if isinstance(orientation, int) else 1
    except Exception:  # of malformed metadata, nearly every kind
        return 1


def _has_late_chunks(file: Path | str) -> bool:
    """Whether anything but its end follows a PNG's pixels: its orientation may stand there."""
    pixels = False
    with open(file, "rb") as png:
        png.seek(8)
        while len(head := png.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if pixels and kind not in (b"IDAT", b"IEND"):
                return True
            pixels = pixels or kind == b"IDAT"
            png.seek(length + 4, os.SEEK_CUR)
    return False


class _Refused(Exception):
    """An image that is not read, and why."""


def _reason(error: Exception) -> str:
    """What is wrong with an image, from the exception that reading it raised."""
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {Image.MAX_IMAGE_PIXELS} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "is not an image"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror})"
    return f"cannot be decoded ({error!r:.90})"
