"""Figures of a run, drawn from the files that the run wrote.

    draw_run(Path("weights"))                # history.jsonl, domain_weights.json -> weights/figures/*.png
    draw_weights_against_quality(weights, quality, Path("figs/weights_against_quality.png"))

Nothing here touches matplotlib's global state; the same input gives the same bytes.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

# Okabe and Ito's colours, which colour-blind people can tell apart, without the pale yellow.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#444444")
INK, GREY, PALE = "#222222", "#777777", "#D0D0D0"
TEXT, SMALL = 10, 9  # points
DPI = 150


def draw_run(folder: Path) -> list[Path]:
    """Draw a run's losses and, if it learned weights, the weights: the paths of what was written, in order.

    A run without meta losses (`--baseline`) has losses only; one that ended before its first line has nothing.
    """
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines if line.strip()]
    if not history:
        return []
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    paths = []
    if "meta_loss" in history[-1]:
        weights = json.loads((folder / "domain_weights.json").read_text(encoding="utf-8"))["weights"]
        paths = [figures / "domain_weights.png", figures / "weights_over_time.png"]
        draw_weights(weights, paths[0])
        draw_weights_over_time(history, paths[1])
    paths.append(figures / "losses.png")
    draw_losses(history, paths[-1])
    return paths


def draw_weights(weights: dict[str, float], path: Path) -> None:
    """Horizontal bars, largest weight first."""
    names = sorted(weights, key=lambda name: (-weights[name], name))
    values = np.array([weights[name] for name in names])
    rows = np.arange(len(names))
    figure, axes = _axes(7.0, 1.1 + 0.26 * len(names))
    axes.barh(rows, values, height=0.7, color=np.where(values >= 1, BLUE, SKY))
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for row, value in zip(rows, values, strict=True):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # keeps the line at 1 out of the number
        axes.annotate(f"{value:.2f}", (value, row), (5, 0), textcoords="offset points", va="center", fontsize=TEXT,
                      color=INK, bbox=box)  # fmt: skip
    axes.set_yticks(rows, [_shown(name) for name in names], fontsize=TEXT)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, max(1.1, 1.12 * values.max())), ylim=(len(names) - 0.4, -0.6))
    axes.set_xlabel("weight (mean 1; dashed: every domain alike)", fontsize=TEXT)
    _save(figure, path)


def draw_weights_over_time(history: list[dict], path: Path) -> None:
    """One line a domain from 1 at step 0, named at its right end."""
    last = history[-1]["weights"]
    names = sorted(last, key=lambda name: (last[name], name))
    steps = [0] + [line["step"] for line in history]
    figure, axes = _axes(8.0, max(3.6, 1.0 + 0.19 * len(names)))
    axes.axhline(1, color=PALE, linewidth=1, zorder=0)
    for i, name in enumerate(names):
        style = ("-", (0, (5, 1.5)), (0, (1.5, 1)))[i // len(COLOURS) % 3]
        values = [1.0] + [line["weights"][name] for line in history]
        axes.plot(steps, values, color=COLOURS[i % len(COLOURS)], linestyle=style, linewidth=1.5)
    axes.set_xlim(0, steps[-1])
    axes.set_xlabel("optimizer steps of the reward model", fontsize=TEXT)
    axes.set_ylabel("domain weight", fontsize=TEXT)
    figure.draw_without_rendering()  # settles the limits and the height that the names are spread over
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    height = axes.get_window_extent().height / figure.dpi * 72  # points
    ends = np.array([(last[name] - low) / (high - low) for name in names])
    for i, place in enumerate(spread_out(ends, 1.25 * SMALL / height)):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot((1, 1.015, 1.045), (ends[i], ends[i], place), transform=axes.transAxes, clip_on=False,
                  color=colour, linewidth=0.8)  # fmt: skip
        axes.text(1.052, place, f"{_shown(names[i])}  {last[names[i]]:.2f}", transform=axes.transAxes, fontsize=SMALL,
                  va="center", color=INK)  # fmt: skip
    _save(figure, path)


def draw_losses(history: list[dict], path: Path) -> None:
    """The losses of both levels, or of the lower one alone: a smoothed line over the faint raw one."""
    panels = {"train_loss": ("training loss", BLUE), "meta_loss": ("meta loss", VERMILION)}
    panels = {name: panel for name, panel in panels.items() if name in history[-1]}
    figure = Figure(figsize=(4.4 * len(panels) if len(panels) > 1 else 6.0, 3.3), dpi=DPI, layout="constrained")
    for axes, (name, (title, colour)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        _plain(axes)
        steps = [line["step"] for line in history if name in line]
        values = np.array([line[name] for line in history if name in line])
        width = max(1, len(values) // 15)
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
        axes.plot(steps, smoothed(values, width), color=colour, linewidth=2, marker="o" if len(steps) == 1 else "")
        note = f"\n(line: mean of {2 * width + 1} updates)" if width > 1 else ""
        axes.set_title(title, fontsize=TEXT + 1, loc="left", color=INK)
        axes.set_xlabel(f"optimizer steps{note}", fontsize=TEXT)
        axes.margins(x=0.02)
    _save(figure, path)


def draw_weights_against_quality(
    weights: dict[str, float], quality: dict[str, float], path: Path, spread: dict[str, float] | None = None
) -> None:
    """Learned weight against true quality, one labelled point a domain that both name.

    spread: half the length of a domain's error bar, for example the standard deviation over seeds.
    """
    names = [name for name in weights if name in quality]
    x, y = (np.array([table[name] for name in names]) for table in (quality, weights))
    figure, axes = _axes(6.4, 4.6)
    axes.axhline(1, color=PALE, linewidth=1, zorder=0)
    bars = np.array([(spread or {}).get(name, 0.0) for name in names])
    if bars.any():
        axes.errorbar(x, y, bars, fmt="none", ecolor=GREY, elinewidth=1, capsize=2.5, zorder=1)
    axes.scatter(x, y, s=42, color=BLUE, edgecolor="white", linewidth=0.8, zorder=2)
    axes.margins(0.1, 0.12)
    axes.set_xlabel("true quality of the domain", fontsize=TEXT)
    axes.set_ylabel("learned weight", fontsize=TEXT)
    rho = f"Spearman's ρ = {spearman(x, y):.2f}, {len(names)} domains"
    axes.set_title(rho, fontsize=TEXT + 1, loc="left", color=INK)
    _label_points(figure, axes, [_shown(name) for name in names], x, y, bars)
    _save(figure, path)


def spearman(x, y) -> float:
    """Spearman's rank correlation, ties given their mean rank; NaN if either side is constant."""
    x, y = _ranks(np.asarray(x, float)), _ranks(np.asarray(y, float))
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) + 1) / 2


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` neighbours on either side, fewer (but as many on both) near the ends; itself for 1."""
    if width <= 1:
        return values
    total = np.concatenate(([0.0], np.cumsum(values)))
    place = np.arange(len(values))
    reach = np.minimum(width, np.minimum(place, place[::-1]))
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)


def spread_out(places: np.ndarray, gap: float) -> np.ndarray:
    """Move ascending places in [0, 1] as little as it takes for neighbours to be `gap` apart (or share the room)."""
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
    unit, inside = figure.dpi / 72, axes.get_window_extent()
    points, tops, bottoms = (axes.transData.transform(np.stack((x, y + sign * bars), 1)) for sign in (0, 1, -1))
    taken = [Bbox([point - 4 * unit, point + 4 * unit]) for point in points]
    taken += [Bbox([low - unit, high + unit]) for low, high in zip(bottoms, tops, strict=True)]
    for label, point in zip(labels, points, strict=True):
        text = axes.annotate(label, axes.transData.inverted().transform(point), (0, 0), textcoords="offset points",
                             fontsize=SMALL, color=INK, va="center", in_layout=False)  # fmt: skip
        size = text.get_window_extent(renderer)
        best = None
        for reach in (7, 12, 18, 26, 36):  # points between the point and the nearest edge of its label
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
                left = dx * reach * unit - (size.width / 2) * (1 - dx)
                middle = dy * (reach * unit + (size.height / 2 if not dx else 0))
                corner = point + (left, middle - size.height / 2)
                box = Bbox([corner, corner + (size.width, size.height)])
                hit = sum(_shared_area(box, other) for other in taken)
                hit += 3 * (size.width * size.height - _shared_area(box, inside))
                if best is None or hit + 1e-6 < best[0]:
                    best = (hit, (left / unit, middle / unit), box, reach)
        _, offset, box, reach = best
        text.set_position(offset)
        taken.append(box)
        if reach > 7:
            edge = np.clip(point, (box.x0, box.y0), (box.x1, box.y1))
            ends = axes.transData.inverted().transform([point, edge])
            axes.plot(*ends.T, color=GREY, linewidth=0.7, zorder=1.5, scalex=False, scaley=False)


def _shared_area(a: Bbox, b: Bbox) -> float:
    """How many square pixels two boxes share."""
    return max(0.0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0.0, min(a.y1, b.y1) - max(a.y0, b.y0))


def _shown(name: str) -> str:
    """A domain's name as figures show it: one line of at most 40 characters, no dollar taken for mathematics."""
    name = " ".join(name.split())
    return (name if len(name) <= 40 else f"{name[:24]}…{name[-15:]}").replace("$", r"\$")


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches and its plain axes."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, _plain(figure.add_subplot())


def _plain(axes: Axes) -> Axes:
    """Axes with the left and the lower line only."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=SMALL, color=GREY, labelcolor=INK)
    return axes


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG of 256 colours, a third of the bytes of one in full colour; it holds nothing but the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
