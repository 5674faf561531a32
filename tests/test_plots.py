"""Figures are valid, of sensible size, the same bytes each time, and what they compute is right."""

import json
import runpy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.axes import Axes
from PIL import Image

from reweighting.fonts import choose_fonts
from reweighting.plots import (
    draw_run,
    draw_weights,
    draw_weights_against_quality,
    shown_name,
    smoothed,
    spread_out,
)

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("whole_figures")


def write_run(folder: Path, domains: int, updates: int, baseline: bool = False) -> Path:
    """A made-up run: its history and its weights."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(updates):
        weights = np.exp(np.linspace(-1, 1, domains) * i / updates)
        line = {"step": 5 * (i + 1), "train_loss": 0.1 + rng.random() / (i + 1)}
        if not baseline:
            line["meta_loss"] = 0.2 + rng.random() / (i + 1)
        names = [f"a $domain$ with_a_{'very_' * k}long name" for k in range(domains)]
        line["weights"] = dict(zip(names, (weights / weights.mean()).tolist(), strict=True))
        lines.append(json.dumps(line | {"rows_seen": 80 * i, "seconds": 0.5 * i}) + "\n")
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text("".join(lines))
    result = {"weights": line["weights"], "step": 5 * updates, "settings": {}}
    known = {"interval": [0.5, 1.5], "verdict": "helps"}
    evidence = {name: {"slope": i / domains} | known for i, name in enumerate(names)}
    evidence[names[0]] = {"slope": -1.5, "interval": None, "verdict": "cannot be told"}
    result["evidence"] = {"domains": evidence}
    (folder / "domain_weights.json").write_text(json.dumps(result))
    return folder


def check_picture(path: Path, limit: int = 150_000) -> None:
    """A PNG that opens, is neither tiny nor huge, small on disk, not empty, and on white."""
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and not picture.info.get("Software")
        assert 600 <= picture.width <= 1800 and 200 <= picture.height <= 2500
        pixels = np.asarray(picture.convert("L"))
    assert path.stat().st_size < limit
    assert pixels[0, 0] == pixels[-1, -1] == 255 and (pixels < 128).any()


def test_the_training_loss_is_named_if_it_is_no_squared_error(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, title, **_: titles.append(title))
    draw_run(folder := write_run(tmp_path / "run", domains=3, updates=3, baseline=True))
    result = json.loads((folder / "domain_weights.json").read_text())
    (folder / "domain_weights.json").write_text(json.dumps(result | {"settings": {"lower_loss": "bce"}}))
    draw_run(folder)
    assert titles == ["training loss", "training loss (bce)"]


def test_a_run_gives_four_figures(tmp_path):
    folder = write_run(tmp_path / "run", 30, 60)
    paths = draw_run(folder)
    names = ("domain_weights", "slopes", "weights_over_time", "losses")
    assert paths == [folder / "figures" / f"{name}.png" for name in names]
    for path in paths:
        check_picture(path)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    folder = write_run(tmp_path / "run", 2, 1)
    first = [path.read_bytes() for path in draw_run(folder)]
    assert first == [path.read_bytes() for path in draw_run(folder)]
    for path in (folder / "figures").iterdir():
        check_picture(path)


def test_a_baseline_run_gives_its_losses_only(tmp_path):
    folder = write_run(tmp_path / "run", 3, 40, baseline=True)
    (path,) = draw_run(folder)
    assert path == folder / "figures" / "losses.png" == next((folder / "figures").iterdir())
    check_picture(path)


def test_a_run_without_history_gives_nothing(tmp_path):
    (tmp_path / "history.jsonl").write_text("")
    assert draw_run(tmp_path) == []


def test_weights_against_quality(tmp_path):
    quality = {f"domain {i}": i / 10 for i in range(10)} | {"not trained": 0.5}
    weights = {f"domain {i}": 0.5 + i / 10 for i in range(10)}
    plain, again, spread = (tmp_path / f"{name}.png" for name in ("plain", "again", "spread"))
    draw_weights_against_quality(weights, quality, plain)
    draw_weights_against_quality(weights, quality, again)
    draw_weights_against_quality(weights, quality, spread, spread=dict.fromkeys(weights, 0.1))
    for path in (plain, spread):
        check_picture(path)
    assert plain.read_bytes() == again.read_bytes() != spread.read_bytes()


def test_names_are_spread_as_little_as_needed():
    np.testing.assert_allclose(spread_out(np.array([0.1, 0.5, 0.9]), 0.1), [0.1, 0.5, 0.9])
    np.testing.assert_allclose(spread_out(np.array([0.5, 0.5]), 0.1), [0.45, 0.55])
    np.testing.assert_allclose(spread_out(np.array([0.0, 0.0, 0.9]), 0.1), [0.0, 0.1, 0.9])
    np.testing.assert_allclose(spread_out(np.ones(3), 0.9), [0.0, 0.5, 1.0])


def test_smoothing_keeps_a_constant_and_means_its_neighbours():
    np.testing.assert_allclose(smoothed([2.0] * 9, 2), 2)
    np.testing.assert_allclose(smoothed([3.0, 0.0, 0.0, 6.0], 1), [1.5, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(smoothed([1.0, 5.0], 0), [1.0, 5.0])


def test_the_readme_pictures(tmp_path, monkeypatch):
    names = [f"domain {i}" for i in range(5)]
    ways = [f"{way}{n}" for way in ("best_of_", "majority_of_", "pass@") for n in (1, 2, 4, 8)]
    table = {way: {"mean": 0.4 + 0.05 * place, "sd": 0.01} for place, way in enumerate(ways)}
    weights = {seed: dict.fromkeys(names, 1.0) | {names[0]: 1.5 + seed / 10} for seed in range(2)}
    shipped = {
        "quality": {name: i / 5 for i, name in enumerate(names)},
        "weights": {"learned weights": weights},
        "methods": {"learned weights": table, "equal weights": table},
    }
    (tmp_path / "results.json").write_text(json.dumps({"shipped": shipped}))
    flags = {"output_dir": tmp_path, "results": tmp_path / "results.json"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["draw_figures.py", *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(ROOT / "figs" / "draw_figures.py"), run_name="__main__")
    for name in ("flow.png", "two_levels.png", "weights_against_quality.png", "best_of_n.png"):
        check_picture(tmp_path / name, limit=250_000)


def test_losses_that_are_no_numbers_leave_a_gap(tmp_path):
    folder = write_run(tmp_path / "run", 3, 60)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for place in (20, 59):
        lines[place]["meta_loss"] = None
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in draw_run(folder):
        check_picture(path)


def test_a_name_in_another_script_is_drawn_in_a_font_that_has_it():
    lacking = "\u1d81"  # DejaVu Sans lacks it and STIXGeneral has it; both come with matplotlib
    assert choose_fonts(["ü½"]) == (["DejaVu Sans"], ["ü½"])
    families, texts = choose_fonts(["ü½", f"a{lacking}b"])
    assert families[0] == "DejaVu Sans" and len(families) > 1 and texts == ["ü½", f"a{lacking}b"]
    path = font_manager.findfont(font_manager.FontProperties(family=families[1]))
    assert ord(lacking) in font_manager.get_font(path).get_charmap()


def test_characters_that_no_font_has_are_boxes_and_named_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(font_manager, "get_font_names", lambda: ["DejaVu Sans"])
    monkeypatch.setattr("reweighting.fonts._warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_weights({"图表": 1.2, "표": 0.8, "ascii": 1.0}, tmp_path / "weights.png")
        draw_weights_against_quality({"图表": 1.2, "b": 0.8}, {"图表": 0.9, "b": 0.1}, tmp_path / "quality.png")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no installed font has 图表표: the figures show boxes")
    assert choose_fonts(["图1"]) == (["DejaVu Sans"], ["\N{WHITE SQUARE}1"])
    for name in ("weights", "quality"):
        check_picture(tmp_path / f"{name}.png")


def test_names_of_domains_are_one_line_that_a_terminal_does_not_obey():
    assert shown_name("a\x1b[31m\nb \u202e") == r"a\x1b[31m b \u202e"
    assert len(shown_name("x" * 100)) == 40
