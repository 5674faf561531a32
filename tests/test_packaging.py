"""What `pip install` gives: the wheel's contents, the command `dreamprm`, and using a PRM without Betty."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from reweighting import __version__
from reweighting.cli import COMMANDS
from reweighting.entrypoint import INSTALL_BETTY
from tests.runs import flags

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {module for module, _ in COMMANDS.values()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, unpacked: a folder that stands for an environment's site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("dreamprm-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def without_betty(tmp_path_factory) -> str:
    """A folder that, early on the path, makes `import betty` fail as where Betty is not installed."""
    folder = tmp_path_factory.mktemp("without_betty")
    (folder / "betty.py").write_text("raise ModuleNotFoundError(\"No module named 'betty'\", name='betty')\n")
    return str(folder)


def dreamprm(site: Path, *arguments: str, path: str = "", folder: Path | None = None) -> subprocess.CompletedProcess:
    """Run the installed command as its script does, with `path` and `site` before this environment's packages."""
    script = "import sys; from reweighting.cli import main; sys.argv[0] = 'dreamprm'; sys.exit(main())"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [path, str(site)]))}
    return subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        cwd=folder,
    )


def test_the_wheel_holds_the_package_the_backbone_and_the_command(wheel):
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "reweighting").rglob("*") if path.is_file()}
    ours = {name for name in ours if "__pycache__" not in name}
    backbone = {path.name for path in (ROOT / "backbone").iterdir() if path.is_file() and path.suffix != ".py"}
    info = f"dreamprm-{__version__}.dist-info"
    held = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    expected = ours | {f"reweighting/_backbone/{name}" for name in backbone}
    assert {name for name in held if not name.startswith(info)} == expected
    assert (wheel / info / "entry_points.txt").read_text().split() == ["[console_scripts]", "dreamprm", "=",
                                                                       "reweighting.cli:main"]  # fmt: skip
    assert (wheel / info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    metadata = (wheel / info / "METADATA").read_text(encoding="utf-8")
    assert "\nLicense-Expression: Apache-2.0\n" in metadata and "Requires-Dist: betty" not in metadata


def test_the_installed_package_finds_its_backbone_wherever_it_is_started(wheel, tmp_path):
    (tmp_path / "backbone").mkdir()  # not ours
    code = "from reweighting.config.training import EMBEDDED_BACKBONE as b; print(b, b.is_dir())"
    env = os.environ | {"PYTHONPATH": str(wheel)}
    out = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.stdout.split() == [str(wheel / "reweighting" / "_backbone"), "True"], out.stderr


def test_help_lists_every_command_and_each_has_its_script(wheel):
    out = dreamprm(wheel, "--help")
    assert out.returncode == 0
    for name, (module, purpose) in COMMANDS.items():
        assert re.search(rf"^  {name} +{purpose}$", out.stdout, re.M)
        assert (ROOT / "reweighting" / f"{module}.py").is_file()
    assert dreamprm(wheel, "--version").stdout == f"dreamprm {__version__}\n"


@pytest.mark.parametrize("arguments", [(), ("no-such",), ("best_of_n",)])
def test_a_name_that_is_no_command_is_refused(wheel, arguments):
    out = dreamprm(wheel, *arguments)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert all(name in out.stderr for name in COMMANDS) or not arguments


def test_using_a_reward_model_needs_no_betty(wheel, without_betty, demo, weights_path, tmp_path):
    """`best-of-n`, `evaluate` and `show` run, from a folder that is not the repository, on a saved model."""
    shared = ["--weights_path", str(weights_path)]
    test, train = str(demo / "test.json"), str(demo / "train.json")
    runs = [
        ("best-of-n", "--candidates_json_file", test, "--output", "selections.json"),
        ("evaluate", "--eval_json_file", train, "--output", "evaluation"),
        ("show", "--candidates_json_file", test, "--id", "0", "--output", "answer.html"),
    ]
    for run in runs:
        out = dreamprm(wheel, *run, *shared, path=without_betty, folder=tmp_path)
        assert out.returncode == 0, out.stderr
    assert len(json.loads((tmp_path / "selections.json").read_text())) == 6
    assert {"evaluation", "answer.html"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_training_without_betty_names_the_command_that_installs_it(wheel, without_betty, demo, tmp_path):
    out = dreamprm(wheel, "train", *flags(demo, tmp_path / "weights"), path=without_betty)
    assert out.returncode == 2
    (line,) = out.stderr.splitlines()
    assert line.startswith("error: ") and INSTALL_BETTY in line
    script = [sys.executable, str(ROOT / "reweighting" / "main.py"), *flags(demo, tmp_path / "weights")]
    env = os.environ | {"PYTHONPATH": without_betty}
    assert subprocess.run(script, env=env, capture_output=True, text=True, timeout=300).stderr == out.stderr


def test_the_command_trains_with_the_embedded_backbone(wheel, demo, tmp_path):
    out = dreamprm(wheel, "train", *flags(demo, tmp_path / "weights", "--baseline"), folder=tmp_path)
    assert out.returncode == 0, out.stderr
    config = json.loads((tmp_path / "weights" / "prm" / "prm_config.json").read_text())
    assert Path(config["backbone"]) == wheel / "reweighting" / "_backbone"
    assert dreamprm(wheel, "train", "--help").stdout.startswith("usage: dreamprm train ")


def test_dependencies_allow_the_pinned_versions():
    """Each pin of requirements.txt is a dependency of the package, and the other way round."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = {Requirement(line).name: line.partition("==")[2] for line in lines if line and not line.startswith("#")}
    needed = {requirement.name: requirement for requirement in map(Requirement, PROJECT["project"]["dependencies"])}
    assert set(needed) == set(pins)
    for name, requirement in needed.items():
        assert requirement.specifier.contains(pins[name]), (str(requirement), pins[name])


def test_the_makefile_and_the_error_install_the_same_betty():
    version = re.search(r"^BETTY = (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M).group(1)
    assert INSTALL_BETTY.endswith(f" {version}")


def test_only_scripts_touch_the_path_and_only_when_they_are_started():
    """A module that is imported leaves sys.path alone; a script puts the root in place of its own folder."""
    for file in sorted((ROOT / "reweighting").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        started = [
            node
            for node in tree.body
            if isinstance(node, ast.If) and "__name__ == '__main__'" in ast.unparse(node.test)
        ]
        inside = "\n".join(ast.unparse(statement) for node in started for statement in node.body)
        count = ast.unparse(tree).count("sys.path")
        if file.parent.name == "reweighting" and file.stem in SCRIPTS:
            assert count == inside.count("sys.path[0] = ") == 1, file
        else:
            assert count == 0, file
