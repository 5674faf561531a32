"""Image files as the models take them: upright, RGB, not too large."""

import os
import stat
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from reweighting.data.row_files import shown
from reweighting.errors import UnreadableImage


def open_image(image: Path | str | Image.Image, max_side: int | None = None) -> Image.Image:
    """Open an image as upright RGB, transparency laid over white, its longest side at most `max_side` px.

    Raises UnreadableImage if the file is missing or no readable image.
    """
    source = image
    try:
        if not isinstance(source, Image.Image):
            with Image.open(source) as image:
                image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):  # a plain convert() would clip what is above 255 to white
            image = image.convert("F")
            brightest = image.getextrema()[1]
            scale = 255 if brightest <= 1 else 1 if brightest <= 255 else 1 / 257  # of [0, 1], 8 or 16 bits
            image = image.point(lambda value: value * scale + 0).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except Exception as error:  # Pillow raises a dozen kinds for broken files, SyntaxError among them
        raise UnreadableImage(f"cannot read the image {source}: {error}") from error
    size = shrunk_size(image.size, max_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def shrunk_size(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """Width and height of an image once its longest side has at most `max_side` pixels."""
    if max_side is None or max(size) <= max_side:
        return size
    width, height = (max(1, round(side * max_side / max(size))) for side in size)
    return width, height


IMAGE_THREADS = 4


def check_images(names: Iterable[str], json_folder: Path, root: Path | None, decode: bool) -> dict[str, Path | str]:
    """For each `image_path` the file, decoded once if asked for, or a text that says what is wrong with it."""
    located = {name: locate_image(name, json_folder, root) for name in dict.fromkeys(names)}
    files = list(dict.fromkeys(file for file in located.values() if isinstance(file, Path))) if decode else []

    # Loading Pillow's formats inside the threads is a race: the loser may not know TIFF, say.
    Image.init()
    # Filters hold for all threads, so they are set here; `decode_image` itself refuses what Pillow only warns of.
    with warnings.catch_warnings(), ThreadPoolExecutor(IMAGE_THREADS) as pool:
        warnings.simplefilter("ignore")
        reasons = dict(zip(files, pool.map(decode_image, files), strict=True))

    for name, file in located.items():
        if reason := file if isinstance(file, str) else reasons.get(file):
            located[name] = f"found {shown(name)}, {reason}, allowed: an image that Pillow can read, or null"
    return located


def locate_image(name: str, json_folder: Path, root: Path | None) -> Path | str:
    """The file with symlinks resolved, or why there is none."""
    folders = [json_folder, Path.cwd()] if root is None else [root]
    try:
        for folder in folders:
            file = _resolved(os.path.join(folder, name))
            if root is not None and not Path(file).is_relative_to(root):
                return f"which leads outside {root}"
            if os.path.isfile(file):
                return Path(file)
    except ValueError:  # a NUL character, or one that file names cannot hold
        return "which cannot be a path"
    where = "" if os.path.isabs(name) else " in " + " or ".join(map(str, folders))
    return f"which is no file{where}"


def _resolved(path: str) -> str:
    """As os.path.realpath, which asks for every folder on the way each time. Raises ValueError for what is no path."""
    folder, name = os.path.split(path)
    try:
        plain = stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        plain = False
    return os.path.join(_resolved_folder(folder), name) if plain else os.path.realpath(path)


@lru_cache(maxsize=1024)
def _resolved_folder(folder: str) -> str:
    return os.path.realpath(folder)


def decode_image(file: Path) -> str | None:
    """Decodes the whole image; returns what is wrong with it, or None."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with Image.open(file) as image:  # reads the header only, and refuses a size of 0
            if limit is not None and image.width * image.height > limit:
                return f"which has more than {limit} pixels"
            image.load()
    except Image.DecompressionBombError:
        return f"which has more than {limit} pixels"
    except UnidentifiedImageError:
        return "which is not an image"
    except Exception as error:  # Pillow's decoders raise nearly every kind of exception on damaged files
        return f"which cannot be decoded ({error!r:.90})"
    return None
