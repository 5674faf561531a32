"""Write docs/cli.md, the command-line reference, from the dataclasses of the flags.

python docs/generate_cli_reference.py
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from reweighting.cli import COMMANDS  # noqa: E402
from reweighting.config.commands import CONFIGS  # noqa: E402
from reweighting.config.parsing import groups_of  # noqa: E402
from reweighting.config.training import EMBEDDED_BACKBONE  # noqa: E402

GROUPS_OF = {name: list(groups_of(CONFIGS[f"reweighting.{module}"]).values()) for name, (module, _) in COMMANDS.items()}
PAGE = ROOT / "docs" / "cli.md"
INTRODUCTION = """\
<!-- Written by docs/generate_cli_reference.py: change the flags in reweighting/config/ instead. -->

# Command-line reference

`pip install .` gives the command `dreamprm`; `dreamprm COMMAND` and `python reweighting/SCRIPT` are the same code. A
flag that is true or false is switched on by its name and off by `--no_` and its name, where both are possible.
"""


def reference() -> str:
    """Return the page's text."""
    parts = [INTRODUCTION]
    for command, groups in GROUPS_OF.items():
        module, purpose = COMMANDS[command]
        parts.append(f"## {command}\n\n`dreamprm {command}` or `python reweighting/{module}.py`: {purpose}.\n")
        if command == "train":
            parts.append("`--recipe FILE`, or `--config FILE`, reads flags from a JSON or YAML file; flags on the "
                         "command line win.\n")  # fmt: skip
        for group in groups:
            rows = "\n".join(map(flag_row, dataclasses.fields(group)))
            parts.append(f"### {heading(group)}\n\n| flag | default | meaning |\n| --- | --- | --- |\n{rows}\n")
    return "\n".join(parts)


def heading(group: type) -> str:
    """Return a group's heading: its docstring's first line, without the scripts that share it."""
    line = (group.__doc__ or "").splitlines()[0].rstrip(".")
    if line.endswith(".py"):
        line = line.rpartition(":")[0] or "This command"
    return line


def flag_row(field: dataclasses.Field) -> str:
    """Return a flag's row: its names, its default, and what it does with the values that it may have."""
    names = ", ".join(f"`{name}`" for name in (f"--{field.name}", *field.metadata.get("aliases", [])))
    meaning = field.metadata["help"]
    choices = literals(field.type)
    if choices:
        meaning += f". One of {', '.join(f'`{choice}`' for choice in choices)}"
    return f"| {names} | {default(field)} | {meaning} |".replace("  ", " ")


def literals(kind: object) -> tuple[str, ...]:
    """Return the values of the `Literal` in a type, or none."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(choice for part in get_args(kind) for choice in literals(part))


def default(field: dataclasses.Field) -> str:
    """Return a flag's default as the table shows it."""
    if field.default is dataclasses.MISSING:
        return "needed"
    if field.default == str(EMBEDDED_BACKBONE):
        return "`backbone/`"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return "" if field.default is None else f"`{field.default}`"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
