"""One question with its scored candidates as a self-contained HTML page: no script, nothing loaded from elsewhere."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from reweighting.data.images import open_image

IMAGE_SIDE = 1200  # pixels: sharp on a page, and no megabytes of photo
GENERATOR = "reweighting/show.py"  # names the pages as ours
HEAD = 1000  # bytes of a page, with the generator in them


@dataclass(frozen=True)
class PageCandidate:
    """A candidate as the page shows it.

    Attributes:
        number: from 1.
        steps: the text of each step and its score in (0, 1).
        aggregate: the candidate as one number, a logit.
        correct: whether its answer is; None if that is not known.
    """

    number: int
    steps: list[tuple[str, float]]
    aggregate: float
    correct: bool | None = None


def html_page(
    question: str, images: Sequence[Path], candidates: Sequence[PageCandidate], chosen: int, aggregation: str
) -> str:
    """Fill the page's template; all text is escaped.

    Args:
        question: the text.
        images: the files, which go into the page in this order.
        candidates: at least one.
        chosen: the number of the chosen one, from 1.
        aggregation: the name of what makes the aggregates.

    Returns:
        The page as text.

    Raises:
        UserError: if an image cannot be read.
    """
    return render(
        "page.html.jinja",
        generator=GENERATOR,
        title=" ".join(question.split())[:80],
        question=question,
        pictures=[data_uri(image) for image in images],
        candidates=candidates,
        chosen=chosen,
        aggregation=aggregation,
    )


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; all text is escaped."""
    environment = Environment(
        loader=PackageLoader("reweighting.inference"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def is_own_page(path: Path) -> bool:
    """Return whether a file is a page that `html_page` made."""
    with open(path, "rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(HEAD)


def data_uri(image: Path) -> str:
    """Return the image as the page holds it: upright, at most IMAGE_SIDE pixels, without a camera's metadata.

    Raises:
        UserError: if it cannot be read.
    """
    data = io.BytesIO()
    open_image(image, IMAGE_SIDE).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
