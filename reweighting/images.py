"""Image files as the models take them: upright, RGB, not too large."""

from pathlib import Path

from PIL import Image, ImageOps

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
