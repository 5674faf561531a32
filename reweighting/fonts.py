"""Fonts for names in any script: installed ones stand in where the figures' own font lacks a character."""

import sys
from collections.abc import Sequence
from functools import lru_cache

from matplotlib import font_manager

OWN_FONT = "DejaVu Sans"  # comes with matplotlib
BOX = "\N{WHITE SQUARE}"
NO_FONT = "Last Resort"  # a font of boxes, which has every character

_warned: set[str] = set()  # characters


def choose_fonts(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Choose font families that together have all characters of the texts.

    Characters that no installed font has are named in one warning on stderr, once a process.

    Args:
        texts: what will be drawn.

    Returns:
        Names for matplotlib's `fontfamily`, the figures' own font first, and the texts, with a box for each character
        that no font has.
    """
    families = [OWN_FONT]
    missing = {char for text in texts for char in text if not char.isspace()} - _characters(OWN_FONT)
    # Sans-serif fonts first, to look like the own one.
    for name in sorted(font_manager.get_font_names(), key=lambda name: ("Sans" not in name, name)) if missing else ():
        if not name.startswith(NO_FONT) and missing & _characters(name):
            families.append(name)
            missing -= _characters(name)
    if missing - _warned:
        shown = "".join(sorted(missing - _warned)[:20])
        print(f"warning: no installed font has {shown}: the figures show boxes instead; a font such as Noto Sans CJK "
              "has Chinese, Japanese and Korean characters", file=sys.stderr)  # fmt: skip
        _warned.update(missing)
    return families, ["".join(BOX if char in missing else char for char in text) for text in texts]


@lru_cache(maxsize=256)
def _characters(name: str) -> frozenset[str]:
    """The characters of a family's upright font; none if it cannot be read."""
    try:
        path = font_manager.findfont(font_manager.FontProperties(family=name), fallback_to_default=False)
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()
