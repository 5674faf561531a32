"""Draw the README's pictures: of the method, and of what `benchmarks/demo_runs.py` found, if it has run.

    python figs/draw_figures.py

Pictures and answers are real ones of the demo world; the scores in them are made up, and marked so.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from random import Random

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from demo_world.pictures import KINDS, draw_picture  # noqa: E402
from demo_world.solutions import Policy, random_question  # noqa: E402

from reweighting.plots import (  # noqa: E402
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    VERMILION,
    draw_best_of_n,
    draw_weights_against_quality,
)

WIDTH = 12.0  # inches; at 900 pixels a point is 1.04 pixels
DPI = 150
BIG, TEXT, SMALL = 15, 12.5, 11.5  # points
SCORE_COLOURS = LinearSegmentedColormap.from_list("score", ["#E8833A", "#F6EBDD", "#D9E8F3", "#4C9CCB"])
PANEL = "#EFF3F6"
DOMAIN_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION)

# Illustrative: scores of a good PRM. They fall at the first incorrect step and stay low.
CORRECT_SCORES = (0.61, 0.89, 0.91, 0.95, 0.98)
INCORRECT_SCORES = (0.63, 0.14, 0.15, 0.11, 0.07)
OTHER_SCORES = (0.58, 0.86, 0.90, 0.21, 0.12)

V_TRACK = 11.2  # inches: where the meta gradient comes down in the bilevel picture


class Sheet:
    """An empty page measured in inches from its lower left corner, and what is drawn on it."""

    def __init__(self, height: float):
        self.height = height
        self.figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, height))
        self.axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, fill="white", edge=GREY, line=1.2, corner=0.08):
        """A rounded rectangle whose lower left corner is (x, y)."""
        shape = f"round,pad=0,rounding_size={corner}"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, shape, fc=fill, ec=edge, lw=line))

    def disc(self, x: float, y: float, edge: str):
        """A white disc around (x, y)."""
        self.axes.add_patch(Circle((x, y), 0.25, fc="white", ec=edge, lw=1.5))

    def text(self, x: float, y: float, words: str, size=TEXT, colour=INK, at="left", bold=False, **more):
        """Words at a point; `at` says which part of them stands there: left, center or right."""
        style = {"va": "center", "weight": "bold" if bold else "normal"} | more
        self.axes.text(x, y, words, fontsize=size, color=colour, ha=at, **style)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour=INK, line=1.8):
        """A straight arrow between two points."""
        style = {"arrowstyle": "-|>", "mutation_scale": 16, "shrinkA": 0, "shrinkB": 0}
        self.axes.add_patch(FancyArrowPatch(start, end, color=colour, lw=line, **style))

    def picture(self, image: Image.Image, x: float, y: float, side: float, edge=GREY, line=1.2):
        """A square picture with a frame; (x, y) is its lower left corner."""
        self.axes.imshow(np.asarray(image), extent=(x, x + side, y, y + side), aspect="auto", zorder=2)
        self.axes.add_patch(FancyBboxPatch((x, y), side, side, "square,pad=0", fc="none", ec=edge, lw=line, zorder=3))

    def save(self, path: Path) -> None:
        """Write a PNG of 256 colours, the same bytes each time."""
        self.axes.set(xlim=(0, WIDTH), ylim=(0, self.height))
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        picture = picture.quantize(256, dither=Image.Dither.NONE)
        picture.save(path, optimize=True)
        print(path)


def tint(colour: str, share: float) -> tuple[float, ...]:
    """A colour mixed with white: `share` of it is left."""
    return tuple(1 - share * (1 - part) for part in to_rgb(colour))


def example(kind_name: str, keys: set[str]):
    """Return (picture, question, a correct response, an incorrect one that misreads the picture) of the demo world."""
    kind = KINDS[kind_name]
    for seed in range(100_000):
        rng = Random(seed)
        question = random_question(kind, rng)
        if question.operation != "total" or set(question.keys) != keys:
            continue
        correct, incorrect = (Policy().respond(question, rng, outcome) for outcome in (True, False))
        if incorrect.first_slip == 1:
            return draw_picture(kind, question.entries, rng), question, correct, incorrect
    raise ValueError(f"no such question about {kind_name}")


def bars(sheet: Sheet, x: float, y: float, heights, colours, width=0.2, gap=0.1) -> None:
    """Small upright bars on a line that starts at (x, y)."""
    for i, (height, colour) in enumerate(zip(heights, colours, strict=True)):
        sheet.box(x + i * (width + gap), y, width, height, fill=colour, edge=colour, line=0, corner=0.01)
    sheet.axes.plot((x - 0.08, x + len(heights) * (width + gap) - gap + 0.08), (y, y), color=INK, lw=1.2)


def draw_flow(path: Path) -> None:
    """Two JSON files -> training -> PRM and weights; then picture, question and candidates -> the best candidate."""
    sheet = Sheet(9.65)
    _training(sheet, top=9.5)
    _best_of_n(sheet, top=5.3)
    sheet.arrow((9.67, 5.87), (9.67, 4.69), BLUE, line=2.4)
    sheet.save(path)


def _training(sheet: Sheet, top: float) -> None:
    sheet.box(0.15, top - 3.8, 11.7, 3.8, fill=PANEL, edge="none")
    sheet.text(0.4, top - 0.34, "Training", BIG, bold=True)
    height, upper, lower = 1.2, top - 1.85, top - 3.6  # two rows of boxes and their lower edges

    for y, name, words in (
        (upper, "meta.json", "a few clean whole answers,\ncorrect or incorrect"),
        (lower, "train.json", "answers from K domains, each\nstep with its Monte Carlo\naccuracy"),
    ):
        sheet.box(0.4, y, 3.0, height)
        sheet.text(0.57, y + height - 0.25, name, bold=True, family="monospace")
        sheet.text(0.57, y + height - 0.5, words, SMALL, linespacing=1.3, va="top")
        sheet.arrow((3.45, y + height / 2), (4.2, y + height / 2))
        sheet.arrow((8.0, y + height / 2), (8.75, y + height / 2))

    sheet.box(4.25, upper, 3.7, height, fill=tint(VERMILION, 0.14), edge=VERMILION)
    sheet.text(6.1, upper + 0.92, "Learn the domain weights", at="center", bold=True)
    sheet.text(6.1, upper + 0.42, "does the PRM that comes out\njudge whole answers better?", SMALL, at="center")
    sheet.box(4.25, lower, 3.7, height, fill=tint(BLUE, 0.14), edge=BLUE)
    sheet.text(6.1, lower + 0.92, "Fine-tune the PRM", at="center", bold=True)
    sheet.text(6.1, lower + 0.4, r"$\sum_k\ w_k\ \times$ loss of domain $k$", at="center")
    sheet.arrow((5.5, upper - 0.03), (5.5, lower + height + 0.03), VERMILION)
    sheet.arrow((6.7, lower + height + 0.03), (6.7, upper - 0.03), BLUE)
    sheet.text(5.36, upper - 0.28, r"weights $w_k$", SMALL, at="right")
    sheet.text(6.84, upper - 0.28, "PRM", SMALL)

    sheet.box(8.8, upper, 2.8, height, fill=tint(VERMILION, 0.14), edge=VERMILION)
    sheet.text(10.2, upper + 0.95, "domain_weights.json", at="center", bold=True, family="monospace")
    bars(sheet, 9.5, upper + 0.17, (0.55, 0.47, 0.37, 0.22, 0.1), DOMAIN_COLOURS)
    sheet.box(8.8, lower, 2.8, height, fill=tint(BLUE, 0.14), edge=BLUE)
    sheet.text(10.2, lower + 0.84, "prm/", at="center", bold=True, family="monospace")
    sheet.text(10.2, lower + 0.42, "process reward model", SMALL, at="center")


def _best_of_n(sheet: Sheet, top: float) -> None:
    picture, question, correct, incorrect = example("price_tags", {"circle", "star"})
    sheet.box(0.15, top - 5.15, 11.7, 5.15, fill=PANEL, edge="none")
    sheet.text(0.4, top - 0.34, "Use: the best of N answers", BIG, bold=True)
    left, row, chip = 2.95, 0.29, 6.4  # of the answers: left edge, height of a step, left edge of its score
    y = top - 0.8
    sheet.text(0.4, y, "Image and question", bold=True)
    sheet.text(left + chip + 0.32, y, "Step scores", at="center", bold=True)
    sheet.text(11.05, y, "Aggregate", at="center", bold=True)
    sheet.text(11.6, top - 0.34, "example scores", SMALL, GREY, at="right", style="italic")
    sheet.picture(picture, 0.4, y - 2.38, 2.15)
    words = question.text.removeprefix("Question: ").split()
    lines = [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
    sheet.text(0.4, y - 2.58, "\n".join(lines), SMALL, linespacing=1.3, va="top")

    for number, response, scores in ((1, incorrect, INCORRECT_SCORES), (2, correct, CORRECT_SCORES)):
        sheet.text(left, y, f"Answer {number}", bold=True)
        for i, (step, score) in enumerate(zip(response.steps, scores, strict=True)):
            y -= row
            sheet.box(left, y - 0.13, chip + 0.64, 0.26, fill=SCORE_COLOURS(score), edge="none", corner=0.04)
            sheet.text(left + 0.1, y - 0.01, step.replace("\n", " "), SMALL)
            sheet.text(left + chip + 0.32, y - 0.01, f"{score:.2f}", SMALL, at="center", bold=True)
            if i == response.first_slip:
                sheet.text(left + chip - 0.15, y - 0.01, "misread", SMALL, "#8A3B00", at="right", style="italic")
        _verdict(sheet, left + chip + 0.72, y + 2 * row, scores, chosen=response is correct)
        y -= 0.42
    sheet.text(left + 0.42, y + 0.11, "⋮", BIG, at="center")
    y -= 0.2
    sheet.text(left, y - 0.02, "Answer N", bold=True)
    for i, score in enumerate(OTHER_SCORES):
        sheet.box(left + 1.24 + 1.18 * i, y - 0.16, 1.08, 0.28, SCORE_COLOURS(score), edge="none", corner=0.04)
        sheet.text(left + 1.78 + 1.18 * i, y - 0.03, f"{score:.2f}", SMALL, at="center", bold=True)
    _verdict(sheet, left + chip + 0.72, y - 0.02, OTHER_SCORES, chosen=False)


def _verdict(sheet: Sheet, x: float, y: float, scores, chosen: bool) -> None:
    """The aggregate of an answer's scores, with a mark if it is the best."""
    aggregate = np.mean([math.log(score / (1 - score)) for score in scores])
    sheet.arrow((x, y), (x + 0.4, y))
    sheet.box(x + 0.5, y - 0.2, 0.96, 0.4, BLUE if chosen else "white", BLUE if chosen else GREY)
    colour = "white" if chosen else INK
    sheet.text(x + 0.98, y - 0.015, f"{1 / (1 + math.exp(-aggregate)):.2f}", colour=colour, at="center", bold=chosen)
    if chosen:
        sheet.text(x + 0.98, y - 0.4, "chosen", colour=BLUE, at="center", bold=True)


def draw_two_levels(path: Path) -> None:
    """The bilevel picture: forward through a window of optimizer steps, up to the meta loss, and backwards again."""
    sheet = Sheet(8.5)
    _upper_level(sheet, base=5.25)
    _lower_level(sheet, base=0.15)
    for start, end, x, colour, words in (
        (5.5, 4.08, 2.5, VERMILION, "weights $w_k$"),
        (1.52, 5.5, 0.75, VERMILION, ""),
        (3.72, 5.5, 9.3, BLUE, r"the PRM after the window, $\phi_5$"),
        (5.5, 1.0, V_TRACK, VERMILION, r"$v=\partial L\,/\,\partial \phi_5$"),
    ):
        if x == V_TRACK:  # turns left there
            sheet.axes.plot((x, x), (start, end), color=colour, lw=2.4)
        else:
            sheet.arrow((x, start), (x, end), colour, line=2.4)
        sheet.text(x + (0.14 if x < 5 else -0.14), 4.87, words, colour=colour, at="left" if x < 5 else "right")
    sheet.save(path)


def _upper_level(sheet: Sheet, base: float) -> None:
    sheet.box(0.15, base, 11.7, 3.1, fill=tint(VERMILION, 0.08), edge="none")
    sheet.text(4.1, base + 2.73, "Upper level: the domain weights", BIG, bold=True)
    y = base + 0.25

    sheet.box(0.4, y, 3.3, 2.6, edge=VERMILION)
    sheet.text(2.05, y + 2.3, r"$\alpha_k$: a number for each domain", at="center")
    bars(sheet, 1.32, y + 1.2, (0.72, 0.6, 0.45, 0.25, 0.12), DOMAIN_COLOURS, 0.22, 0.1)
    sheet.text(2.05, y + 0.82, r"$w_k\propto\mathrm{softplus}(\alpha_k)$, mean 1", at="center")
    sheet.text(2.05, y + 0.36, "from the slopes of all windows", SMALL, GREY, at="center")

    picture, *_ = example("price_tags", {"circle", "star"})
    height = 2.0
    sheet.box(4.1, y, 3.35, height)
    sheet.text(4.25, y + height - 0.27, "Meta chains", bold=True)
    sheet.picture(picture, 4.25, y + 0.17, 1.3)
    for i in range(5):
        sheet.text(5.72, y + 1.34 - 0.26 * i, f"Step {i + 1}: …", SMALL)
    sheet.text(7.0, y + 0.82, "correct:\n$r=1$", SMALL, at="center", linespacing=1.4)
    sheet.arrow((7.5, y + height / 2), (7.85, y + height / 2))
    sheet.box(7.9, y, 1.75, height, fill=tint(BLUE, 0.14), edge=BLUE)
    sheet.text(8.78, y + height - 0.27, "PRM", at="center", bold=True)
    sheet.text(8.78, y + 1.15, "aggregate", SMALL, at="center")
    sheet.text(8.78, y + 0.72, r"$A=\mathrm{mean}\ z$", 14, at="center")
    sheet.arrow((9.7, y + height / 2), (10.05, y + height / 2))
    sheet.box(10.1, y, 1.55, height, edge=VERMILION)
    sheet.text(10.88, y + height - 0.27, "Meta loss", at="center", bold=True)
    sheet.text(10.88, y + 0.85, r"$(\sigma(A)-r)^2$", 13.5, at="center")


def _lower_level(sheet: Sheet, base: float) -> None:
    sheet.box(0.15, base, 11.7, 4.35, fill=tint(BLUE, 0.08), edge="none")
    sheet.text(4.1, base + 3.98, "Lower level: the PRM", BIG, bold=True)
    forward, kept, back = base + 3.3, base + 2.1, base + 0.85  # the heights of three rows

    sheet.box(1.15, base + 1.75, 2.55, 2.15, fill=tint(BLUE, 0.14), edge=BLUE)
    sheet.text(2.43, base + 3.62, "One domain at a time", at="center", bold=True)
    for i, (name, colour) in enumerate(zip(("bar_chart", "pie_chart", "table"), DOMAIN_COLOURS, strict=False)):
        rng = Random(i)
        picture = draw_picture(KINDS[name], random_question(KINDS[name], rng).entries, rng)
        sheet.picture(picture, 1.35 + 0.75 * i, base + 2.72, 0.65, edge=colour, line=3)
    sheet.text(2.43, base + 2.15, r"$\sum_k\,w_k\ \mathrm{mean}\,(\sigma(z)-p)^2$", 13, at="center")
    sheet.arrow((3.75, forward), (4.03, forward), BLUE)

    for n in range(6):
        x = 4.3 + n
        sheet.disc(x, forward, BLUE)
        sheet.text(x, forward, rf"$\phi_{n}$", 14, at="center")
        if n == 5:
            break
        sheet.arrow((x + 0.27, forward), (x + 0.73, forward), BLUE)
        for i, domain in enumerate((n, (n + 2) % 5)):
            sheet.box(x + 0.27, kept - 0.3 + 0.32 * i, 0.46, 0.26, DOMAIN_COLOURS[domain], "none", corner=0.03)
        sheet.arrow((x + 0.5, forward - 0.12), (x + 0.5, kept + 0.38), GREY, line=1.2)
        sheet.arrow((x + 0.5, kept - 0.36), (x + 0.5, back + 0.3), GREY, line=1.2)
        sheet.disc(x + 0.5, back, VERMILION)
        sheet.text(x + 0.5, back, rf"$u_{n + 1}$", 14, at="center")
        sheet.arrow((x + 1.23 if n < 4 else V_TRACK, back), (x + 0.78, back), VERMILION)
    sheet.text(9.7, forward, "steps of AdamW\n(here five)", SMALL, BLUE, linespacing=1.3)
    sheet.text(9.15, kept, "kept: each domain's\n" r"gradient $g_{nk}$", SMALL, linespacing=1.3)
    sheet.text(9.15, back + 0.42, "AdamW backwards", SMALL, VERMILION)
    sheet.arrow((4.52, back), (3.78, back), VERMILION)
    sheet.box(0.4, back - 0.55, 3.3, 1.1, edge=VERMILION)
    sheet.text(2.05, back, r"$\partial L\,/\,\partial w_k=\sum_n\,\langle u_n,\,g_{nk}\rangle$", 14, at="center")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "demo_runs.json")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "figs")
    args = parser.parse_args()
    draw_flow(args.output_dir / "flow.png")
    draw_two_levels(args.output_dir / "two_levels.png")
    if args.results.exists():
        draw_results(json.loads(args.results.read_text(encoding="utf-8"))["shipped"], args.output_dir)


def draw_results(shipped: dict, folder: Path) -> None:
    """What `demo_runs.py` found on the shipped demo: means and standard deviations over seeds."""
    learned = list(shipped["weights"]["learned weights"].values())
    over_seeds = {domain: [weights[domain] for weights in learned] for domain in learned[0]}
    means = {domain: float(np.mean(values)) for domain, values in over_seeds.items()}
    spread = {domain: float(np.std(values, ddof=1)) for domain, values in over_seeds.items()}
    draw_weights_against_quality(means, shipped["quality"], folder / "weights_against_quality.png", spread)

    def curve(table: dict, name: str) -> dict[int, tuple[float, float]]:
        return {n: (table[f"{name}{n}"]["mean"], table[f"{name}{n}"]["sd"]) for n in (1, 2, 4, 8)}

    shown = [name for name in ("learned weights", "equal weights", "true qualities") if name in shipped["methods"]]
    curves = {name: curve(shipped["methods"][name], "best_of_") for name in shown}
    any_method = shipped["methods"][shown[0]]  # the others need no model
    curves |= {"majority vote": curve(any_method, "majority_of_"), "any is correct": curve(any_method, "pass@")}
    draw_best_of_n(curves, folder / "best_of_n.png")


if __name__ == "__main__":
    main()
