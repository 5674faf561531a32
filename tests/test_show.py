"""show.py and html_page.py: one self-contained page, all text escaped, and what a real browser makes of it."""

import base64
import errno
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reweighting.errors import UserError
from reweighting.inference.html_page import PageCandidate, html_page
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.show import main
from tests.forked import run

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>document.title='run'</script> & \"q\" <img src=x>"


class Texts(HTMLParser):
    """The text of each `li` and `h2`, and each tag's attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.texts, self.tags = {"li": [], "h2": [], "h1": [], "b": []}, []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in self.texts:
            self._open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        if tag in self.texts:
            self._open.remove(tag)

    def handle_data(self, data):
        for tag in self._open:
            self.texts[tag][-1] += data


@pytest.fixture(scope="module")
def shown(demo, weights_path, tmp_path_factory):
    """The page of a question whose text tries to be HTML, by the real command; and its row."""
    rows = json.loads((demo / "test.json").read_text())
    row = rows[2] | {"id": "q/2", "input": f"Question: {EVIL}"}
    row["candidates"] = [f"{row['candidates'][0]}\n{EVIL}", *row["candidates"][1:]]
    (demo / "show.json").write_text(json.dumps([rows[0], row, rows[3] | {"id": "q/2"}, {"id": "faulty"}]))
    output = tmp_path_factory.mktemp("page") / "answer.html"
    arguments = ["--weights_path", str(weights_path), "--candidates_json_file", str(demo / "show.json")]
    done = run("show.py", *arguments, "--id", "q/2", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "warning: 2 rows have the id q/2; the first is shown" in done.stderr
    return output, row


def check(html: str, row: dict, demo: Path, weights_path: Path) -> None:
    """Check that the page shows what the model gives."""
    found = Texts(html)
    model = ProcessRewardModel.from_pretrained(weights_path / "prm")
    image = demo / row["image_path"]
    scores = [model.score(image, row["input"], response) for response in row["candidates"]]
    best = model.rank(image, row["input"], row["candidates"])[0]
    assert found.texts["h1"] == [row["input"]]
    assert [float(text) for text in found.texts["b"]] == pytest.approx(sum(scores, []), abs=0.0051)
    assert len(found.texts["li"]) == 20 and any(EVIL in text for text in found.texts["li"])
    assert [("chosen" in text) for text in found.texts["h2"]] == [number == best for number in range(4)]
    assert [("✓" in text) for text in found.texts["h2"]] == row["true_false"]
    assert [tag for tag, _ in found.tags].count("img") == 1 and "script" not in [tag for tag, _ in found.tags]
    for tag, attributes in found.tags:
        links = [attributes[name] for name in ("src", "href") if name in attributes]
        assert all(link.startswith(("data:image/png;base64,", "#")) for link in links), tag


def test_the_page_is_whole_and_escaped(shown, demo, weights_path):
    html = shown[0].read_text(encoding="utf-8")
    check(html, shown[1], demo, weights_path)
    assert "@media print" in html and "prefers-color-scheme: dark" in html and "width=device-width" in html
    assert not re.search(r"https?://|@import|url\(", html)


def browse(*arguments: str) -> str:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_in_a_browser(shown, demo, weights_path, tmp_path):
    url = shown[0].as_uri()
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    check(browse(profile, "--dump-dom", url), shown[1], demo, weights_path)
    pictures = {}
    for name, width, scheme in (("phone", 500, 1), ("dark", 500, 0), ("desktop", 1200, 1)):
        path = tmp_path / f"{name}.png"
        size = f"--window-size={width},1200"
        browse(profile, size, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={path}", url)
        pictures[name] = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert pictures["phone"].mean() > 180 > 90 > pictures["dark"].mean()
    # The image of the question is drawn: its own colours are there, at phone width too.
    corner = np.asarray(Image.open(demo / shown[1]["image_path"]).convert("RGB"))[0, 0].astype(int)
    for picture in pictures.values():
        assert (np.abs(picture - corner).sum(-1) < 12).sum() > 500
    # The boxes go from side to side, and nothing is drawn in the margins.
    blank = np.abs(pictures["desktop"] - 255).sum(-1) == 0
    assert blank[:, :150].all() and blank[:, -150:].all() and not blank[:, 250].all()
    phone = np.abs(pictures["phone"] - 255).sum(-1) == 0
    assert phone[:, :5].all() and phone[:, -5:].all() and not phone[:, 30].all() and not phone[:, -30].all()
    browse(profile, f"--print-to-pdf={tmp_path / 'page.pdf'}", url)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_a_page_without_known_answers_and_with_any_number_of_images(tmp_path):
    candidates = [PageCandidate(1, [("a", 0.2)], -1.4), PageCandidate(2, [("b", 0.8), ("c", 0.6)], 0.9)]
    found = Texts(html_page("Q", (), candidates, 2, "min"))
    assert found.texts["li"] == ["0.20a", "0.80b", "0.60c"]
    assert found.texts["h2"] == ["Candidate 1 · min -1.40", "Candidate 2 · ★ chosen · min 0.90"]
    assert "img" not in [tag for tag, _ in found.tags]
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    found = Texts(html_page("Is <image> in <image>?", (tmp_path / "b.png", tmp_path / "a.png"), candidates, 2, "min"))
    pictures = [attributes["src"].partition(",")[2] for tag, attributes in found.tags if tag == "img"]
    colours = [Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) for data in pictures]
    assert colours == [(0, 0, 255), (255, 0, 0)] and found.texts["h1"] == ["Is <image> in <image>?"]


def test_what_the_user_can_fix(demo, weights_path, tmp_path):
    arguments = ["--weights_path", str(weights_path), "--candidates_json_file", str(demo / "test.json")]
    with pytest.raises(UserError, match="no row has the id 99"):
        main([*arguments, "--id", "99", "--output", str(tmp_path / "a.html")])
    with pytest.raises(UserError, match="cannot be written"):
        main([*arguments, "--id", "1", "--output", "/proc/nothing/a.html"])


def test_only_an_earlier_page_is_replaced(shown, demo, weights_path, tmp_path):
    arguments = ["--weights_path", str(weights_path), "--candidates_json_file", str(demo / "test.json"), "--id", "1"]
    notes = tmp_path / "notes.html"
    notes.write_text("<p>mine")
    (tmp_path / "empty.html").touch()
    inputs = (demo / "test.json", weights_path / "prm" / "prm_config.json")
    for output in (tmp_path, notes, tmp_path / "empty.html", *inputs):
        before = output.read_bytes() if output.is_file() else None
        with pytest.raises(UserError, match="is there and no page of show.py. Name another"):
            main([*arguments, "--output", str(output)])
        assert before is None or output.read_bytes() == before
    page = tmp_path / "page.html"
    page.write_bytes(shown[0].read_bytes())
    main([*arguments, "--output", str(page)])
    assert page.read_bytes() != shown[0].read_bytes() and "Candidate 4" in page.read_text()


def test_a_candidate_of_which_nothing_is_known_is_called_neither():
    candidates = [PageCandidate(1, [("a", 0.2)], -1.4, None), PageCandidate(2, [("b", 0.8)], 0.9, False)]
    html = html_page("Q", (), candidates, 2, "min")
    assert "correct answer" not in html.replace("incorrect answer", "").partition("<section")[2]
    assert Texts(html).texts["h2"][1] == "Candidate 2 · ★ chosen · ✗ incorrect answer · min 0.90"


def test_a_full_disk_leaves_the_earlier_page(shown, demo, weights_path, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_bytes(shown[0].read_bytes())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    arguments = ["--weights_path", str(weights_path), "--candidates_json_file", str(demo / "test.json"), "--id", "1"]
    with pytest.raises(UserError, match="cannot be written: No space left"):
        main([*arguments, "--output", str(page)])
    assert page.read_bytes() == shown[0].read_bytes() and list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_an_output_needs_a_name(name):
    with pytest.raises(UserError, match="--output: found (an empty value|.*allowed: a path that ends in a name)"):
        main(["--candidates_json_file", "x.json", "--id", "1", "--output", name])
