"""One question with its scored candidates as a self-contained HTML page: no script, nothing loaded from elsewhere."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from reweighting.data.images import open_image

IMAGE_SIDE = 1200  # pixels: sharp on a page, and no megabytes of photo

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #666; --line: #ccc; --mark: #0072b2;
        --lightness: 88%; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eee; --paper: #161616; --faint: #aaa; --line: #444; --mark: #56b4e9; --lightness: 24%; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 50rem; color: var(--ink); background: var(--paper);
       font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.15rem; white-space: pre-wrap; }
h2 { font-size: 1rem; margin: 0 0 .5rem; }
img { display: block; max-width: 100%; min-width: min(14rem, 100%); height: auto; border: 1px solid var(--line);
      background: #fff; }
a { color: var(--mark); }
p.note { color: var(--faint); font-size: .9rem; }
section { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; margin: 1rem 0; break-inside: avoid; }
section.chosen { border: 3px solid var(--mark); }
.badge { background: var(--mark); color: var(--paper); border-radius: .25rem; padding: .1rem .4rem; }
ol { list-style: none; margin: 0; padding: 0; }
li { display: flex; gap: .6rem; border-radius: .25rem; padding: .3rem .5rem; margin: .2rem 0;
     background: hsl(var(--hue) var(--strength) var(--lightness)); }
li b { flex: none; font-variant-numeric: tabular-nums; }
li span { white-space: pre-wrap; }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --faint: #444; --line: #999; --mark: #0072b2;
          --lightness: 88%; }
  body { max-width: none; padding: 0; font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  img { max-height: 8cm; width: auto; }
}
@media (max-width: 30rem) { body { padding: .6rem; } section { padding: .5rem; } }
"""


def page(
    question: str,
    image: Path | None,
    candidates: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    aggregates: Sequence[float],
    chosen: int,
    aggregation: str,
    right: Sequence[bool] | None = None,
) -> str:
    """The page as text.

    candidates, scores: the steps of each candidate and their scores in (0, 1). aggregates: one for each candidate, as
    a logit. chosen: an index into candidates. right: whether each is right, where that is known. Raises UserError if
    the image cannot be read.
    """
    picture = f'<img src="{data_uri(image)}" alt="the image of the question">\n' if image is not None else ""
    sections = []
    for number, (steps, values, total) in enumerate(zip(candidates, scores, aggregates, strict=True)):
        words = [f"Candidate {number + 1}"]
        if number == chosen:
            words.append('<span class="badge">★ chosen</span>')
        if right is not None:
            words.append("✓ right answer" if right[number] else "✗ wrong answer")
        words.append(f"{escape(aggregation)} {total:.2f}")
        items = "\n".join(_item(step, value) for step, value in zip(steps, values, strict=True))
        kind = ' class="chosen" id="chosen"' if number == chosen else ""
        sections.append(f"<section{kind}>\n<h2>{' · '.join(words)}</h2>\n<ol>\n{items}\n</ol>\n</section>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(' '.join(question.split())[:80])}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(question)}</h1>\n{picture}"
        '<p class="note">Each step has its score, from 0 (orange) to 1 (blue): how likely the reasoning up to there '
        f"still ends right. {escape(aggregation)} is the candidate as one number; the highest is chosen: "
        f'<a href="#chosen">candidate {chosen + 1}</a>.</p>\n' + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def _item(step: str, score: float) -> str:
    """A step as a list item: orange, grey, blue, since many people cannot tell red from green."""
    colour = f"--hue: {25 if score < 0.5 else 210}; --strength: {abs(200 * score - 100):.0f}%"
    return f'<li style="{colour}"><b>{score:.2f}</b><span>{escape(step)}</span></li>'


def data_uri(image: Path) -> str:
    """The image in the page itself: upright, at most IMAGE_SIDE pixels, without what a camera adds (place, owner)."""
    data = io.BytesIO()
    open_image(image, IMAGE_SIDE).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
