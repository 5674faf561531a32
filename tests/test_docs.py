"""README and docs/ are true: their commands run, their rows are valid, their flags, files and links exist."""

import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from reweighting.cli import COMMANDS
from reweighting.config.labeling import LabelConfig
from reweighting.config.training import TrainingConfig
from reweighting.data.load_answers import LoadReport, iterate_answers
from reweighting.data.load_rows import iterate_candidate_rows, load_meta_rows, load_training_rows
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)).removeprefix("docs/"): path.read_text(encoding="utf-8") for path in PAGES}
SMALL = ["--iteration_num", "10", "--unroll_steps", "5", "--batch_size", "2", "--meta_batch_size", "4"]
QUESTIONS, FEW = 16, ["--answers", "2", "--rollouts", "2"]
SCRIPTS = {f"reweighting/{module}.py": module for module, _ in COMMANDS.values()}
OTHERS_FLAGS = {  # of pip, torchrun, accelerate, sbatch, vLLM and llama.cpp
    "--no-deps", "--ignore-requires-python", "--nproc_per_node", "--shutdown_timeout", "--signals-to-handle",
    "--multi_gpu", "--mpirun_hostfile", "--num_processes", "--nodes", "--mixed_precision", "--cpu", "--help",
    "--array", "--data-parallel-size",
}  # fmt: skip


def blocks(language: str, text: str) -> list[str]:
    """The contents of a page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """A page's commands, a list of words each."""
    return [shlex.split(line) for block in blocks("bash", text) for line in block.splitlines()]


def reference_module():
    """docs/generate_cli_reference.py as a module."""
    spec = importlib.util.spec_from_file_location("generate_cli_reference", ROOT / "docs" / "generate_cli_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- commands and examples


@pytest.fixture(scope="module")
def reader(demo, tmp_path_factory, request) -> Path:
    """The working folder of somebody who tries what they read: the repository's layout, with a small demo."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "data" / "rollouts").mkdir(parents=True)
    for name in ("train.json", "meta.json", "test.json", "images"):
        (folder / "data" / name).symlink_to(demo / name)
    (folder / "data" / "policy").symlink_to(ROOT / "data" / "policy")
    for name in ("held_out.json", "images"):
        (folder / "data" / "rollouts" / name).symlink_to(ROOT / "data" / "rollouts" / name)
    questions = (ROOT / "data" / "rollouts" / "questions.jsonl").read_text().splitlines()[:QUESTIONS]
    (folder / "data" / "rollouts" / "questions.jsonl").write_text("\n".join(questions))
    (folder / "recipes").symlink_to(ROOT / "recipes")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    request.addfinalizer(patch.undo)
    return folder


def follow(command: list[str]) -> str:
    """Run a command if it is quick, with a training made small; else check that its flags are accepted."""
    words, launcher = command, None
    if words[0] in ("torchrun", "accelerate", "sbatch"):
        launcher = words[0]
        start = next(i for i, word in enumerate(words) if word in SCRIPTS or word.startswith("examples/"))
        assert (ROOT / words[start]).is_file()
        module, flags = "main", words[start + 1 :]
        if words[start] == "examples/label.sh":  # its flags: tests/labeling/test_slurm.py
            module, flags = "label", [*words[start + 2 :], "--policy", "http://localhost/v1", "--policy_model", "MODEL"]
    elif words[0] == "dreamprm":
        module, flags = COMMANDS[words[1]][0], words[2:]
    else:
        assert words[0] == "python", command
        module, flags = SCRIPTS[words[1]], words[2:]
    if module == "label":
        policy = Path(LabelConfig.parse(flags).policy.policy[0])
        if not policy.is_dir():  # needs a server: tests/labeling has one
            return "parsed"
        flags = [*flags, *FEW]
    if module == "main":
        config = TrainingConfig.parse(flags)
        if launcher or not Path(config.model.reward_model).is_dir():
            return "parsed"
        flags = [*flags, *SMALL]
    importlib.import_module(f"reweighting.{module}").main(flags)
    return "run"


def test_every_command_can_be_followed(reader, capsys):
    """From page to page, as a reader would: what README trains is used further on."""
    done: dict[str, str] = {}
    for name, text in TEXTS.items():
        for command in commands(text):
            if shlex.join(command) not in done:
                done[shlex.join(command)] = follow(command)
        for code in blocks("python", text):
            names: dict = {}
            exec(code, names)
            assert len(names["scores"]) == 2 and all(0 < score < 1 for score in names["scores"]), name
            assert sorted(names["order"]) == [0, 1], name
    ran = {COMMANDS[name][0] for name in COMMANDS}
    assert ran <= {SCRIPTS.get(words.split()[1]) for words, how in done.items() if how == "run"}
    for left in ("weights/prm", "selections.json", "evaluation/evaluation.json", "answer.html"):
        assert (reader / left).exists(), left


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {word for text in TEXTS.values() for word in re.findall(r"\bmake ([a-z]+)\b(?=`|\s+#|\n)", text)}
    assert {"train", "test", "docs"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), target


def rows(text: str) -> list[dict]:
    return [json.loads(block) for block in blocks("json", text)]


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if blocks("json", text)])
def test_rows_are_valid(page, tmp_path):
    """Each row alone, and a training row with the minimum of its fields."""
    for number, row in enumerate(rows(TEXTS[page])):
        if "steps" in row:
            (tmp_path / "rows.json").write_text(json.dumps([row]))
            source, options = Source(str(tmp_path / "rows.json")), ReadingOptions(ignore_images=True)
            assert len(list(iterate_answers(source, None, options, LoadReport()))) == 1
            continue
        row["image_path"] = None
        path = tmp_path / f"{number}.json"
        if "add" in row:
            least = {name: row[name] for name in ("input", "add", "image_path", "dataset", "accuracy")}
            for content in (row, least):
                path.write_text(json.dumps([content, content | {"dataset": "other"}]))
                assert len(load_training_rows(path)) == 2
        elif "candidates" in row:
            path.write_text(json.dumps([row]))
            assert len(list(iterate_candidate_rows(path))) == 1
        else:
            path.write_text(json.dumps([row, row | {"true_false": not row["true_false"]}]))
            assert len(load_meta_rows(path)) == 2
    assert {"README.md", "data.md"} <= {name for name, text in TEXTS.items() if rows(text)}


def test_recipes_are_listed():
    for path in (ROOT / "recipes").iterdir():
        assert f"`recipes/{path.name}`" in TEXTS["training.md"], path


def test_the_published_recipe_holds_what_its_page_says(tmp_path):
    recipe = yaml.safe_load((ROOT / "recipes" / "qwen2_vl_2b.yaml").read_text(encoding="utf-8"))
    lower, upper = (
        re.search(rf"^\| optimizer, {level} level \| AdamW, (.*?) \|", TEXTS["published.md"], re.M).group(1)
        for level in ("lower", "upper")
    )
    assert lower == "lr 5e-7, weight decay 0" and (recipe["lr"], recipe["weight_decay"]) == (5e-7, 0.0)
    assert upper.startswith("lr 0.01, weight decay 1e-3")
    assert (recipe["meta_optimizer"], recipe["meta_lr"], recipe["meta_weight_decay"]) == ("adamw", 0.01, 1e-3)


# ---------------------------------------------------------------- flags, files, links


def flags_of_commands() -> set[str]:
    """Every flag of every command, with the `--no_` twins of those that are true or false."""
    names = {"--recipe", "--config"}
    for groups in reference_module().GROUPS_OF.values():
        for group in groups:
            for field in dataclasses.fields(group):
                names |= {f"--{field.name}", *field.metadata.get("aliases", [])}
                if "bool" in str(field.type):
                    names.add(f"--no_{field.name}")
    return names


def test_flags_exist():
    known = flags_of_commands() | OTHERS_FLAGS
    for name, text in TEXTS.items():
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text.replace("`--no_`", "")):
            assert flag in known, f"{name}: {flag}"


def test_files_exist():
    folders = "reweighting|data|backbone|benchmarks|recipes|figs|tests|docs|examples"
    everywhere = {path.name for folder in folders.split("|") for path in (ROOT / folder).rglob("*.py")}
    for name, text in TEXTS.items():
        for path in re.findall(rf"`((?:{folders})/[\w./-]*)", text):
            assert (ROOT / path).exists() or "/images/" in path, f"{name}: {path}"
        for module in re.findall(r"`(?:[\w/]+/)?(\w+\.py)", text):
            assert module in everywhere, f"{name}: {module}"
        for path, test in re.findall(r"`(tests/[\w./]+)::(\w+)", text):
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{name}: {test}"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    return {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)", text, re.M)
    }


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", TEXTS[page])
    assert links
    for link in links:
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            assert (ROOT / path).exists(), link
            assert not anchor or anchor in anchors((ROOT / path).read_text(encoding="utf-8")), link


def test_the_readme_stays_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200
    assert len(README.read_bytes()) <= 12_000


def test_the_command_line_reference_is_new():
    reference = reference_module()
    assert set(reference.GROUPS_OF) == set(COMMANDS)
    message = "stale: python docs/generate_cli_reference.py"
    assert reference.PAGE.read_text(encoding="utf-8") == reference.reference(), message
    for flag in flags_of_commands() - {"--recipe", "--config"}:
        assert f"`{flag}`" in reference.reference() or flag.startswith("--no_")


def test_the_site_builds_without_a_dead_link(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.SafeLoader)["nav"]
    listed = re.findall(r"[\w-]+\.md", str(pages))
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    for picture in (ROOT / "figs").glob("*.png"):
        assert (tmp_path / "site" / "figs" / picture.name).is_file()
