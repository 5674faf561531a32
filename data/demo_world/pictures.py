"""Pictures of the demo world: ten kinds, each showing a number for each of four keys (colours, letters or shapes).

A picture is 224 x 224 pixels and laid out on a 4 x 4 grid of cells of 56 pixels, the patch of picture that one image
token of the small backbone covers; every number stands inside one cell. Anything that a person cannot read off the
picture, the questions do not ask.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFont

SIDE = 224
CELL = SIDE // 4
COLOURS = {
    "red": (214, 39, 40),
    "blue": (31, 90, 200),
    "green": (40, 150, 60),
    "orange": (250, 150, 20),
    "purple": (140, 60, 180),
    "black": (50, 50, 50),
}
LETTERS = ("A", "B", "C", "D", "E", "F")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "hexagon")
WHITE, INK, PALE = (255, 255, 255), (20, 20, 20), (205, 210, 218)


@dataclass(frozen=True)
class Kind:
    """One kind of picture.

    noun: what a key is called after its name ("bar": "the red bar"); empty if the key names itself ("the star").
    keys: the names that keys are drawn from. low, high: the range of the numbers, both included.
    """

    name: str
    noun: str
    keys: tuple[str, ...]
    low: int
    high: int
    draw: Callable[[ImageDraw.ImageDraw, dict[str, int], Random], None]
    background: tuple[int, int, int] = WHITE

    def phrase(self, key: str) -> str:
        """How texts name a key: "the red bar", "row B", "the star"."""
        if self.keys is LETTERS:
            return f"{self.noun} {key}"
        return f"the {key} {self.noun}".strip()


def draw_picture(kind: Kind, entries: dict[str, int], rng: Random) -> Image.Image:
    """Draw `entries` (key -> number, four of them, in reading order) as a picture: RGB, 224 x 224 pixels."""
    image = Image.new("RGB", (SIDE, SIDE), kind.background)
    kind.draw(ImageDraw.Draw(image), entries, rng)
    return image


def random_entries(kind: Kind, rng: Random) -> dict[str, int]:
    """Four keys of this kind in random order, each with a random number."""
    return {key: rng.randint(kind.low, kind.high) for key in rng.sample(kind.keys, 4)}


_FONTS: dict[int, ImageFont.FreeTypeFont] = {}


def _write(draw: ImageDraw.ImageDraw, centre: tuple[float, float], text, size: int = 34, fill=INK) -> None:
    """Write text around a centre point, in the font that Pillow carries."""
    if size not in _FONTS:
        _FONTS[size] = ImageFont.load_default(size)
    draw.text(centre, str(text), font=_FONTS[size], fill=fill, anchor="mm", stroke_width=1, stroke_fill=fill)


def _centre(column: int, row: int) -> tuple[int, int]:
    """The middle of a grid cell, in pixels."""
    return CELL * column + CELL // 2, CELL * row + CELL // 2


def _some_cells(rng: Random, count: int, cells=None) -> list[tuple[int, int]]:
    """Different random grid cells in reading order (rows from the top, each from the left), as centre points."""
    cells = cells or [(column, row) for row in range(4) for column in range(4)]
    return [_centre(*cell) for cell in sorted(rng.sample(cells, count), key=lambda cell: cell[::-1])]


def _bar_chart(draw, entries, rng) -> None:
    for level in range(16, 3 * CELL, 19):
        draw.line((4, level, SIDE - 4, level), fill=PALE)
    for column, (key, value) in enumerate(entries.items()):
        x, _ = _centre(column, 0)
        draw.rectangle((x - 17, 3 * CELL + 6 - 16 * value, x + 17, 3 * CELL + 8), fill=COLOURS[key])
        _write(draw, (x, 3 * CELL + 31), value)
    draw.line((2, 3 * CELL + 9, SIDE - 2, 3 * CELL + 9), fill=INK, width=2)


def _pie_chart(draw, entries, rng) -> None:
    start, total = rng.randrange(360), sum(entries.values())
    corners = [_centre(column, row) for column, row in ((0, 0), (3, 0), (0, 3), (3, 3))]
    for (key, value), (x, y) in zip(entries.items(), corners, strict=True):
        end = start + 360 * value / total
        draw.pieslice((58, 58, 166, 166), start, end, fill=COLOURS[key], outline=WHITE, width=2)
        start = end
        draw.rectangle((x - 24, y - 24, x + 24, y - 13), fill=COLOURS[key])
        _write(draw, (x, y + 8), value)


def _table(draw, entries, rng) -> None:
    column = rng.randrange(4)
    left, right = CELL * column + 1, CELL * (column + 1) - 1
    draw.rectangle((left, 0, left + CELL // 2, SIDE), fill=(214, 226, 244))
    for row, (key, value) in enumerate(entries.items()):
        x, y = _centre(column, row)
        _write(draw, (x - 13, y), key, 28)
        _write(draw, (x + 14, y), value, 30)
    for x in (left, left + CELL // 2, right):
        draw.line((x, 1, x, SIDE - 2), fill=INK, width=2)
    for y in (1, CELL, 2 * CELL, 3 * CELL, SIDE - 2):
        draw.line((left, y, right, y), fill=INK, width=2)


def _geometry(draw, entries, rng) -> None:
    def near(x: int, y: int) -> tuple[int, int]:
        return x + rng.randint(-7, 7), y + rng.randint(-7, 7)

    a, b, c, d = near(62, 62), near(162, 62), near(162, 162), near(62, 162)
    sides = (((a, b), _centre(1, 0)), ((b, c), _centre(3, 1)), ((d, a), _centre(0, 2)), ((c, d), _centre(2, 3)))
    for (key, value), (ends, (x, y)) in zip(entries.items(), sides, strict=True):
        draw.line(ends, fill=COLOURS[key], width=9)
        draw.ellipse((x - 25, y - 25, x + 25, y + 25), outline=COLOURS[key], width=5, fill=WHITE)
        _write(draw, (x, y), value, 32)


def _map(draw, entries, rng) -> None:
    border = [(c, r) for r in range(4) for c in range(4) if c in (0, 3) or r in (0, 3)]
    river = [(x, 112 + 40 * math.sin(x / 35 + rng.random())) for x in range(-10, SIDE + 20, 28)]
    draw.line(river, fill=(170, 205, 240), width=10, joint="curve")
    towns = _some_cells(rng, 4, border)
    for x, y in towns:
        draw.line((x, y, 112, 112), fill=(150, 140, 120), width=4)
    draw.rectangle((100, 100, 124, 124), fill=INK)
    for (key, value), (x, y) in zip(entries.items(), towns, strict=True):
        draw.ellipse((x - 26, y - 26, x + 26, y + 26), fill=COLOURS[key])
        _write(draw, (x, y), value, 32, WHITE)


_PIPS = {1: "4", 2: "08", 3: "048", 4: "0268", 5: "02468", 6: "035268"}


def _dice(draw, entries, rng) -> None:
    for (key, value), (x, y) in zip(entries.items(), _some_cells(rng, 4), strict=True):
        draw.rounded_rectangle((x - 25, y - 25, x + 25, y + 25), radius=8, fill=COLOURS[key])
        for place in map(int, _PIPS[value]):
            px, py = x + 15 * (place % 3 - 1), y + 15 * (place // 3 - 1)
            draw.ellipse((px - 6, py - 6, px + 6, py + 6), fill=WHITE)


def _clock(draw, entries, rng) -> None:
    for (key, value), (x, y) in zip(entries.items(), _some_cells(rng, 4), strict=True):
        draw.ellipse((x - 27, y - 27, x + 27, y + 27), outline=COLOURS[key], width=4, fill=WHITE)
        for hour in range(12):
            dx, dy = math.sin(hour * math.pi / 6), -math.cos(hour * math.pi / 6)
            draw.line((x + 18 * dx, y + 18 * dy, x + 21 * dx, y + 21 * dy), fill=INK)
        dx, dy = math.sin(value * math.pi / 6), -math.cos(value * math.pi / 6)
        draw.line((x - 5 * dx, y - 5 * dy, x + 20 * dx, y + 20 * dy), fill=COLOURS[key], width=6)


def _polygon(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corner points of a shape around a centre."""
    corners = {"square": 4, "triangle": 3, "diamond": 4, "star": 10, "hexagon": 6}[shape]
    turn = math.pi / 4 if shape == "square" else 0
    points = []
    for i in range(corners):
        reach = radius * (0.55 if shape == "star" and i % 2 else 1)
        angle = turn + 2 * math.pi * i / corners
        points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
    return points


def _price_tags(draw, entries, rng) -> None:
    for y in range(CELL, SIDE, CELL):
        draw.line((0, y - 1, SIDE, y - 1), fill=(215, 200, 175), width=3)
    for (key, value), (x, y) in zip(entries.items(), _some_cells(rng, 4), strict=True):
        rim = COLOURS[rng.choice(list(COLOURS))]
        if key == "circle":
            draw.ellipse((x - 24, y - 24, x + 24, y + 24), fill=(255, 244, 190), outline=rim, width=4)
        else:
            draw.polygon(_polygon(key, x, y, 27), fill=(255, 244, 190), outline=rim, width=4)
        _write(draw, (x, y + 3), value, 28)


_SEGMENTS = {  # top, upper right, lower right, bottom, lower left, upper left, middle
    1: "12", 2: "01463", 3: "01263", 4: "1256", 5: "05623", 6: "054326", 7: "012", 8: "0123456", 9: "012356",
}  # fmt: skip


def _scoreboard(draw, entries, rng) -> None:
    for (key, value), (x, y) in zip(entries.items(), _some_cells(rng, 4), strict=True):
        draw.rectangle((x - 26, y - 26, x + 26, y + 26), fill=COLOURS[key])
        lines = [(-9, -19, 9, -19), (9, -19, 9, 0), (9, 0, 9, 19), (-9, 19, 9, 19), (-9, 0, -9, 19), (-9, -19, -9, 0),
                 (-9, 0, 9, 0)]  # fmt: skip
        for segment in map(int, _SEGMENTS[value]):
            x1, y1, x2, y2 = lines[segment]
            draw.line((x + x1, y + y1, x + x2, y + y2), fill=(255, 245, 160), width=6)


def _tally(draw, entries, rng) -> None:
    for row, (key, value) in enumerate(entries.items()):
        draw.line((0, CELL * row + CELL - 1, SIDE, CELL * row + CELL - 1), fill=(180, 205, 235), width=2)
        x, y = _centre(0, row)
        draw.rectangle((x - 16, y - 16, x + 16, y + 16), fill=COLOURS[key])
        for group, marks in enumerate((min(value, 5), value - 5)):
            x, y = _centre(1 + group, row)
            for mark in range(min(marks, 4)):
                left = x - 18 + 12 * mark
                draw.line((left, y - 19, left, y + 19), fill=COLOURS[key], width=5)
            if marks == 5:
                draw.line((x - 26, y + 14, x + 26, y - 14), fill=COLOURS[key], width=5)


_C = tuple(COLOURS)
KINDS = {
    kind.name: kind
    for kind in (
        Kind("bar_chart", "bar", _C, 1, 9, _bar_chart),
        Kind("clocks", "clock", _C, 1, 12, _clock, (238, 242, 246)),
        Kind("dice", "die", _C, 1, 6, _dice, (222, 236, 222)),
        Kind("geometry", "side", _C, 1, 9, _geometry),
        Kind("map", "town", _C, 1, 9, _map, (244, 238, 220)),
        Kind("pie_chart", "slice", _C, 1, 9, _pie_chart),
        Kind("price_tags", "", SHAPES, 1, 9, _price_tags, (250, 246, 240)),
        Kind("scoreboard", "team", _C, 1, 9, _scoreboard, (28, 30, 36)),
        Kind("table", "row", LETTERS, 1, 9, _table),
        Kind("tally", "row", _C, 1, 9, _tally),
    )
}
