"""The README tells the truth: its tables of flags, its files, its examples."""

import dataclasses
import json
import re
from pathlib import Path

from reweighting.config.inference import GROUPS as INFERENCE_GROUPS
from reweighting.config.training import EMBEDDED_BACKBONE, GROUPS
from reweighting.data.load_rows import load_training_rows

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def flag_tables() -> str:
    """The README's tables of flags, from the flags themselves."""
    lines = []
    for group in (*GROUPS, *INFERENCE_GROUPS):
        lines += [f"**{group.__doc__.rstrip('.')}**", "", "| flag | default | |", "| --- | --- | --- |"]
        for field in dataclasses.fields(group):
            default = "needed" if field.default is dataclasses.MISSING else field.default
            if default == str(EMBEDDED_BACKBONE):
                default = "`backbone/`"
            elif default is False:
                default = "off"
            elif default is True:
                default = "on"
            elif default is None:
                default = ""
            elif default != "needed":
                default = f"`{default}`"
            names = [f"--{field.name}", *field.metadata.get("aliases", [])]
            flags = ", ".join(f"`{name}`" for name in names)
            lines.append(f"| {flags} | {default} | {field.metadata['help']} |")
        lines.append("")
    return "\n".join(lines)


def test_every_flag_stands_in_the_readme():
    for line in flag_tables().splitlines():
        assert line in README, f"the README lacks this line:\n{line}"


def test_pictures_and_files_that_it_names_exist():
    names = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    names += re.findall(r"`((?:reweighting|data|backbone|benchmarks|recipes|figs)/[\w./]*)`", README)
    assert len(names) > 15
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_training_row_of_the_readme_is_valid(tmp_path):
    row = json.loads(re.search(r"```json\n(\{\n.*?\n\})\n```", README, re.S).group(1))
    least = {name: row[name] for name in ("input", "add", "image_path", "dataset", "accuracy")}
    for content in (row, least):
        content["image_path"] = None
        (tmp_path / "train.json").write_text(json.dumps([content, content | {"dataset": "other"}]))
        assert len(load_training_rows(tmp_path / "train.json")) == 2
