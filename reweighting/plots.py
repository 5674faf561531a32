"""Figures of a run, drawn from the files that the run wrote.

    draw_run(Path("weights"))                # history.jsonl, domain_weights.json -> weights/figures/*.png
    draw_reliability(reliability(scores, truth), error, Path("evaluation/reliability.png"))
    draw_weights_against_quality(weights, quality, Path("figs/weights_against_quality.png"))
    draw_best_of_n({"learned weights": {1: (0.41, 0.01), 2: (0.6, 0.01)}}, Path("figs/best_of_n.png"))

Nothing here touches matplotlib's global state; the same input gives the same bytes. Names in scripts that matplotlib's
own font lacks are drawn in an installed font that has them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from reweighting.files import atomic_file
from reweighting.fonts import choose_fonts
from reweighting.terminal import printable

# Okabe and Ito's colours, which colour-blind people can tell apart, without the pale yellow.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#444444")
INK, GREY, PALE = "#222222", "#777777", "#D0D0D0"
TEXT, SMALL = 10, 9  # points
DPI = 150


def draw_run(folder: Path) -> list[Path]:
    """Draw a run's losses and, if it learned weights, the weights.

    A run without meta losses (`--baseline`) has losses only; one without a line of history has nothing.

    Args:
        folder: that of the run, with `history.jsonl` and `domain_weights.json`.

    Returns:
        The paths of the figures, in the order in which to show them.
    """
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    if not history:
        return []
    (figures := folder / "figures").mkdir(exist_ok=True)
    result = json.loads((folder / "domain_weights.json").read_text(encoding="utf-8"))
    draw_losses(history, figures / "losses.png", result["settings"].get("lower_loss", "mse"))
    if "meta_loss" not in history[-1]:
        return [figures / "losses.png"]
    evidence = result["evidence"]["domains"]
    intervals = {name: one["weight_interval"] for name, one in evidence.items() if one.get("weight_interval")}
    draw_weights(result["weights"], figures / "domain_weights.png", intervals)
    draw_slopes(evidence, figures / "slopes.png")
    draw_weights_over_time(history, figures / "weights_over_time.png")
    return [figures / f"{name}.png" for name in ("domain_weights", "slopes", "weights_over_time", "losses")]


def draw_weights(
    weights: dict[str, float], path: Path, intervals: dict[str, tuple[float, float]] | None = None
) -> None:
    """Draw the weights as horizontal bars, the largest first.

    Args:
        weights: {domain: weight}, of mean 1.
        path: the PNG file.
        intervals: {domain: lowest and highest weight}, drawn as lines.
    """
    names = sorted(weights, key=lambda name: (-weights[name], name))
    values, rows = np.array([weights[name] for name in names]), range(len(names))
    figure, axes = _figure(7.0, 1.1 + 0.26 * len(names))
    axes.barh(rows, values, height=0.7, color=np.where(values >= 1, BLUE, SKY))
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    ends = np.array([(intervals or {}).get(name, (weight, weight)) for name, weight in zip(names, values, strict=True)])
    axes.hlines(rows, ends[:, 0], ends[:, 1], color=GREY, linewidth=1.5)
    for row, value, end in zip(rows, values, ends[:, 1], strict=True):
        number = axes.annotate(f"{value:.2f}", (end, row), (5, 0), textcoords="offset points", va="center")
        number.set(fontsize=TEXT, color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    families, labels = choose_fonts([_shown(name) for name in names])
    axes.set_yticks(rows, labels, fontsize=TEXT, fontfamily=families)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, max(1.1, 1.12 * ends.max())), ylim=(len(names) - 0.4, -0.6), xlabel="weight (dashed: the mean)")
    _save(figure, path)


def draw_slopes(evidence: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw each domain's slope with its confidence interval, the most helpful first, coloured by verdict.

    Args:
        evidence: {domain: `slope`, `interval` (None if it cannot be told) and `verdict`}, as in `domain_weights.json`.
        path: the PNG file.
    """
    names = sorted(evidence, key=lambda name: (-evidence[name]["slope"], name))
    figure, axes = _figure(7.0, 1.3 + 0.26 * len(names))
    axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for row, name in enumerate(names):
        one = evidence[name]
        colour = {"helps": BLUE, "hurts": VERMILION}.get(one["verdict"], GREY)
        if one["interval"] is not None:
            axes.plot(one["interval"], (row, row), color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(one["slope"], row, "o", color=colour, markersize=6, markeredgecolor="white")
    families, labels = choose_fonts([_shown(name) for name in names])
    axes.set_yticks(range(len(names)), labels, fontsize=TEXT, fontfamily=families)
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlabel="slope: above 0, more weight lowers the meta loss")
    axes.set_title("blue: helps, orange: hurts, grey: cannot be told", fontsize=TEXT, loc="left")
    _save(figure, path)


def draw_weights_over_time(history: list[dict], path: Path) -> None:
    """Draw one line a domain, from 1 at step 0, named at its right end.

    Args:
        history: the lines of `history.jsonl`, at least one, each with `step` and `weights`.
        path: the PNG file.
    """
    last = history[-1]["weights"]
    names = sorted(last, key=lambda name: (last[name], name))
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]  # neighbours at the right end differ
    thinned = history[:: -(-len(history) // 150)] + history[-1:]  # more would not show
    steps = [0] + [line["step"] for line in thinned]
    figure, axes = _figure(8.0, max(3.6, 1.0 + 0.19 * len(names)))
    axes.axhline(1, color=PALE, linewidth=1, zorder=0)
    for name, colour in zip(names, colours, strict=True):
        axes.plot(steps, [1.0] + [line["weights"][name] for line in thinned], color=colour, linewidth=1.5)
    axes.set(xlim=(0, steps[-1]), xlabel="optimizer steps", ylabel="domain weight")
    figure.draw_without_rendering()  # settles the limits, and the height that the names are spread over
    low, high = axes.get_ylim()
    low, high = axes.set_ylim(max(0, min(low, 0.9)), max(high, 1.1))
    ends = np.array([(last[name] - low) / (high - low) for name in names])
    places = spread_out(ends, 1.25 * SMALL / (axes.get_window_extent().height / figure.dpi * 72))
    bend = 1.04 + 0.12 * np.abs(places - ends).max()
    where: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    families, labels = choose_fonts([f"{_shown(name)}  {last[name]:.2f}" for name in names])
    for label, colour, end, place in zip(labels, colours, ends, places, strict=True):
        axes.plot((1, 1.012, bend, bend + 0.01), (end, end, place, place), color=colour, linewidth=0.8, **where)
        axes.text(bend + 0.016, place, label, fontsize=SMALL, fontfamily=families, va="center", **where)
    _save(figure, path)


def draw_losses(history: list[dict], path: Path, lower_loss: str = "mse") -> None:
    """Draw the losses of both levels, or of the lower one alone: a smoothed line over the faint raw one.

    Args:
        history: the lines of `history.jsonl`; a loss that is None or missing leaves a gap.
        path: the PNG file.
        lower_loss: the value of --lower_loss; only the squared error can be compared with the meta loss.
    """
    training = "training loss" if lower_loss == "mse" else f"training loss ({lower_loss})"
    panels = [("train_loss", training, BLUE), ("meta_loss", "meta loss", VERMILION)]
    panels = [panel for panel in panels if any(line.get(panel[0]) is not None for line in history)]
    figure, places = _panels(2.6 + 3.4 * len(panels), 3.3, len(panels))
    for axes, (name, title, colour) in zip(places, panels, strict=True):
        known = [line for line in history if line.get(name) is not None]  # none in warm-up, or for a step left out
        steps, values = [line["step"] for line in known], [line[name] for line in known]
        width = len(values) // 30
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
        axes.plot(steps, smoothed(values, width), color=colour, linewidth=2, marker="" if len(steps) > 1 else "o")
        note = f" (bold: mean of {2 * width + 1} updates)" if width else ""
        axes.set_title(title, fontsize=TEXT + 1, loc="left")
        axes.set(xlabel=f"optimizer steps{note}", xlim=(0, 1.02 * steps[-1]))
    _save(figure, path)


def draw_reliability(bins: list[dict[str, float]], error: float, path: Path) -> None:
    """Draw mean accuracy against mean score of each bin; a point's area is its share of the steps.

    Args:
        bins: `score`, `truth` and `count` of each, as `metrics.reliability` returns them.
        error: the expected calibration error, for the title.
        path: the PNG file.
    """
    score, truth, count = (np.array([b[name] for b in bins], float) for name in ("score", "truth", "count"))
    figure, axes = _figure(4.8, 4.4)
    axes.plot((0, 1), (0, 1), color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.plot(score, truth, color=BLUE, linewidth=1.5, zorder=2)
    axes.scatter(score, truth, s=20 + 300 * count / count.sum(), color=BLUE, edgecolor="white", zorder=3)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.set(xlabel="score (dashed: as it should be)", ylabel="mean accuracy")
    axes.set_title(f"expected calibration error {error:.3f}, {int(count.sum())} steps", fontsize=TEXT + 1, loc="left")
    _save(figure, path)


def draw_weights_against_quality(
    weights: dict[str, float], quality: dict[str, float], path: Path, spread: dict[str, float] | None = None
) -> None:
    """Draw learned weight against true quality, one labeled point a domain that both name.

    Args:
        weights: {domain: learned weight}.
        quality: {domain: true quality}.
        path: the PNG file.
        spread: {domain: half the length of its error bar}, for example the standard deviation over seeds.
    """
    from scipy.stats import spearmanr  # more than a second, which a training run's figures need not wait for

    names = [name for name in weights if name in quality]
    x, y = (np.array([table[name] for name in names]) for table in (quality, weights))
    figure, axes = _figure(6.4, 4.6)
    axes.axhline(1, color=PALE, linewidth=1, zorder=0)
    bars = np.array([(spread or {}).get(name, 0.0) for name in names])
    if bars.any():
        axes.errorbar(x, y, bars, fmt="none", ecolor=GREY, elinewidth=1, capsize=2.5, zorder=1)
    axes.scatter(x, y, s=42, color=BLUE, edgecolor="white", linewidth=0.8, zorder=2)
    axes.set(xmargin=0.1, ymargin=0.12, xlabel="true quality of the domain", ylabel="learned weight")
    correlation = spearmanr(x, y).statistic
    axes.set_title(f"Spearman's ρ = {correlation:.2f}, {len(names)} domains", fontsize=TEXT + 1, loc="left")
    _label_points(figure, axes, [_shown(name) for name in names], x, y, bars)
    _save(figure, path)


def draw_best_of_n(curves: dict[str, dict[int, tuple[float, float]]], path: Path) -> None:
    """Draw the share of correct answers against the number of candidates, one line for each way of choosing.

    Args:
        curves: {way: {N: (mean, half the length of its bar)}}, as shares of 1; the first ones are drawn on top.
        path: the PNG file.
    """
    figure, axes = _figure(6.4, 4.4)
    most = max(max(curve) for curve in curves.values())
    ends = []
    for place, (name, curve) in enumerate(curves.items()):
        colour, counts = COLOURS[place % len(COLOURS)], sorted(curve)
        means, bars = 100 * np.array([curve[n] for n in counts]).T
        axes.errorbar(counts, means, bars, color=colour, linewidth=1.8, marker="o", markersize=4,
                      elinewidth=1, capsize=2.5, zorder=10 - place)  # fmt: skip
        ends.append((means[-1], name, colour))
    axes.set_xscale("log", base=2)
    ticks = sorted({n for curve in curves.values() for n in curve})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set(xlabel="candidates N", ylabel="questions answered correctly, percent", xlim=(0.93, most * 1.07))
    ends.sort()
    low, high = axes.get_ylim()
    heights = spread_out((np.array([end for end, *_ in ends]) - low) / (high - low), 0.055)
    for (end, name, colour), height in zip(ends, heights, strict=True):
        axes.annotate(f"{name}  {end:.1f}", (1.02, height), xycoords="axes fraction", va="center",
                      fontsize=SMALL, color=colour, annotation_clip=False)  # fmt: skip
    _save(figure, path)


def smoothed(values: Sequence[float] | np.ndarray, width: int) -> np.ndarray:
    """Return for each value the mean over its neighbours.

    Args:
        values: [n], with n > 2 * width.
        width: neighbours on either side, as far as there are any.

    Returns:
        [n].
    """
    window = np.ones(2 * width + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def spread_out(places: np.ndarray, gap: float) -> np.ndarray:
    """Move places as little as it takes to be apart from their neighbours.

    Args:
        places: [n], ascending, in [0, 1].
        gap: the least distance; where there is no room for it, the places share the room.

    Returns:
        [n], ascending, in [0, 1].
    """
    gap = min(gap, 1 / max(1, len(places) - 1))
    blocks: list[list[float]] = []  # places less their share of the gaps; a block's members stand at its mean
    for i, place in enumerate(places):
        blocks.append([place - i * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) >= np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    means = np.concatenate([np.full(len(block), np.mean(block)) for block in blocks])
    return np.clip(means, 0, 1 - (len(places) - 1) * gap) + gap * np.arange(len(places))


def _label_points(figure: Figure, axes: Axes, labels: list[str], x, y, bars) -> None:
    """Write each label beside its point, where it covers least of the points, the bars and the other labels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    unit = figure.dpi / 72
    inside = np.array(axes.get_window_extent().extents)  # boxes are (left, bottom, right, top) in pixels
    points, tops, bottoms = (axes.transData.transform(np.stack((x, y + sign * bars), 1)) for sign in (0, 1, -1))
    taken = [np.r_[point - 4 * unit, point + 4 * unit] for point in points]
    taken += [np.r_[low - unit, high + unit] for low, high in zip(bottoms, tops, strict=True)]
    one = axes.transData.transform((0, 1))[1]  # the line at weight 1
    taken += [np.array([inside[0], one - unit, inside[2], one + unit])]
    sides = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
    families, labels = choose_fonts(labels)
    style: dict[str, Any] = {
        "textcoords": "offset points",
        "fontsize": SMALL,
        "fontfamily": families,
        "color": INK,
        "va": "center",
        "in_layout": False,
    }
    for i, (label, point) in enumerate(zip(labels, points, strict=True)):
        others = np.delete(taken, (i, len(points) + i), axis=0)  # a label's leader may cross its own point and bar
        text = axes.annotate(label, (x[i], y[i]), (0, 0), **style)
        size = np.array(text.get_window_extent(renderer).size)
        lowest = np.inf
        box = leader = end = np.empty(0)
        for reach in (7, 12, 18, 26, 36):  # points between the point and the nearest edge of its label
            for side in sides:
                centre = point + np.multiply(side, reach * unit + size / 2 * (1, side[0] == 0))
                there = np.r_[centre - size / 2, centre + size / 2]
                tip = np.clip(point, there[:2], there[2:])
                spots = point + np.linspace(0.2, 0.95, 8)[:, None] * (tip - point)
                line = np.hstack((spots - 2 * unit, spots + 2 * unit)) if reach > 7 else np.empty((0, 4))
                cost = 2 * reach + 3 * (size.prod() - _shared_area(there, inside))
                cost += _shared_area(there, np.array(taken)) + _shared_area(line, others)
                if cost < lowest:
                    lowest, box, leader, end = cost, there, line, tip
        text.set_position(((box[0] - point[0]) / unit, ((box[1] + box[3]) / 2 - point[1]) / unit))
        taken += [box, *leader]
        if len(leader):
            ends = axes.transData.inverted().transform([point, end]).T
            axes.plot(*ends, color=GREY, linewidth=0.7, zorder=1.5, scalex=False, scaley=False)


def _shared_area(a: np.ndarray, b: np.ndarray) -> float:
    """How many square pixels boxes [..., 4] share with boxes [..., 4], pair by pair."""
    a, b = a.reshape(-1, 1, 4), b.reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return float(sides.clip(0).prod(-1).sum())


def shown_name(name: str) -> str:
    """Return a domain's name for figures and tables: one line of at most 40 characters, none that a terminal obeys."""
    name = printable(" ".join(name.split()), one_line=True)
    return name if len(name) <= 40 else f"{name[:24]}…{name[-15:]}"


def _shown(name: str) -> str:
    """A domain's name in a figure, no dollar taken for mathematics."""
    return shown_name(name).replace("$", r"\$")


def _panels(width: float, height: float, count: int) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches, and its axes side by side."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(labelsize=SMALL, color=GREY, labelcolor=INK)
    return figure, panels


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches, and its axes."""
    figure, (axes,) = _panels(width, height, 1)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG of 64 colours (a quarter of the bytes of full colour) that holds nothing but the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    picture = picture.quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette = picture.getpalette() or []
    picture.putpalette([255 if value == 254 else value for value in palette])  # its white is not quite white
    with atomic_file(path) as file:
        picture.save(file, "PNG", optimize=True)
