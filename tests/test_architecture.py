"""The packages import each other one way, as docs/architecture.md draws it, and their files stay readable."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "reweighting"
COMMANDS = "commands"


def ranks() -> dict[str, int]:
    """{package: its place in the list of docs/architecture.md}, lowest first; `root`, the shared modules, is as low."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.search(r"^## Packages\n(.*?)\n\nOutside", page, re.M | re.S).group(1)
    names = re.findall(r"^\| `?(\w+)", table, re.M)[1:]
    return {name: rank for rank, name in enumerate(names)} | {"root": names.index("distributed")}


def root_modules() -> set[str]:
    """The shared modules at the root of the package, as the page lists them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return set(re.findall(r"`(\w+)\.py`", re.search(r"^\| root modules \| (.*)", page, re.M).group(1)))


def package_of(parts: tuple[str, ...]) -> str:
    """The package of a module, given its path below `reweighting`."""
    if len(parts) > 1 or (PACKAGE / parts[0]).is_dir():
        return parts[0]
    return "root" if parts[0] in root_modules() else COMMANDS


def imports(file: Path) -> list[tuple[int, str]]:
    """The lines and packages of a file's imports from `reweighting`, but for those that only type checkers read."""
    found = []
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if modules == ["reweighting"]:
            modules = [f"reweighting.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            top, *parts = module.split(".")
            if top == "reweighting" and parts and not parts[0].startswith("__"):
                found.append((node.lineno, package_of(tuple(parts))))
    return found


def test_imports_run_one_way():
    rank = ranks()
    against = []
    for file in sorted(PACKAGE.rglob("*.py")):
        here = package_of(file.relative_to(PACKAGE).with_suffix("").parts)
        if file == PACKAGE / "__init__.py":  # loads what it exports when it is asked for
            continue
        for line, there in imports(file):
            if rank[there] > rank[here]:
                against.append(f"{file.relative_to(ROOT)}:{line} imports {there}")
    assert not against, "\n".join(against)


def test_every_package_and_module_is_in_the_list():
    rank = ranks()
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(rank) - {
        "root",
        COMMANDS,
    }
    listed = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in PACKAGE.glob("*.py"):
        assert f"`{path.name}`" in listed or path.name == "__init__.py", path
