"""Runs of one process that those of several are compared with."""

import json
from pathlib import Path

import pytest

from tests.processes import left, parameters_of
from tests.runs import flags
from tests.tiny import tiny_backbone


@pytest.fixture(scope="session")
def tiny(demo):
    """flags() of 50 steps with the tiny backbone; enough chains in a batch for four processes."""
    backbone = str(tiny_backbone())  # made here, for all processes

    def with_more(folder: Path, *more: str) -> list[str]:
        sizes = ["--iteration_num", "50", "--batch_size", "4", "--meta_batch_size", "12"]
        return flags(demo, folder, "--reward_model", backbone, *sizes, *more)

    return with_more


@pytest.fixture(scope="session")
def some_images(demo, tmp_path_factory):
    """Flags for the demo's rows without every second image, and with none at all in half of the domains: some batches
    have an image on one process only, and some on none."""
    folder, files = tmp_path_factory.mktemp("some-images"), []
    for name in ("train", "meta", "test"):
        rows, images = json.loads((demo / f"{name}.json").read_text()), {}
        for row in rows:
            number = images.setdefault(row["image_path"], len(images))
            if number % 2 or row.get("dataset", "") > "pie":
                row["image_path"] = None
        (folder / f"{name}.json").write_text(json.dumps(rows))
        files += [f"--{name.replace('test', 'validation')}_json_file", str(folder / f"{name}.json")]
    return (*files, "--image_root", str(demo))


@pytest.fixture(scope="session")
def one(tiny, demo, tmp_path_factory):
    """The run of one process: its folder, and its parameters at the end, for given flags; each made once."""
    made = {}

    def run(*more: str, double: bool = False):
        if (more, double) not in made:
            folder = tmp_path_factory.mktemp("one")
            parameters_of(tiny(folder / "run", *more), folder / "parameters", double)()
            made[more, double] = folder / "run", left(folder / "parameters")[0]
        return made[more, double]

    return run
