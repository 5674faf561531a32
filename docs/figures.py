"""mkdocs hook: put figs/, which lies beside docs/, into the site, so that links to figures work here and there."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FIGURES = Path(__file__).resolve().parents[1] / "figs"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every picture of figs/ to the site's files."""
    for path in sorted(FIGURES.glob("*.png")):
        files.append(File.generated(config, f"figs/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn `../figs/`, as it is seen from docs/, into the place in the site."""
    return re.sub(r"\]\(\.\./figs/", "](figs/", markdown)
