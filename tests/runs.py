"""Running the command in tests, and reading what it leaves."""

import json
from pathlib import Path

from reweighting.files import digest

ROOT = Path(__file__).resolve().parent.parent


def flags(demo: Path, output: Path, *more: str) -> list[str]:
    """A run of 10 steps, two windows, with small batches; flags in `more` win. By AdamW, two windows move weights."""
    files = ["--train_json_file", str(demo / "train.json"), "--meta_json_file", str(demo / "meta.json")]
    sizes = ["--iteration_num", "10", "--batch_size", "2", "--unroll_steps", "5"]
    upper = ["--meta_batch_size", "4", "--meta_optimizer", "adamw"]
    if {"--baseline", "--domain_weights", "--instance_weights"} & set(more):  # no upper level
        files, upper = files[:2], []
    return [*files, "--weights_path", str(output), *sizes, *upper, "--save_every_iterations", "5", *more]


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def without_times(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in history(folder)]


def weights(folder: Path) -> dict[str, float]:
    return json.loads((folder / "domain_weights.json").read_text())["weights"]


def same_results(one: Path, other: Path) -> None:
    """Check that two runs left the same files, but for the times in them and the folders' own names."""
    assert without_times(one) == without_times(other)
    results = [json.loads((folder / "domain_weights.json").read_text()) for folder in (one, other)]
    for result in results:
        del result["settings"]["weights_path"]
    assert results[0] == results[1]
    for folder in ("prm", "figures"):
        names = sorted(path.name for path in (one / folder).iterdir())
        assert names == sorted(path.name for path in (other / folder).iterdir())
        for name in names:
            assert (one / folder / name).read_bytes() == (other / folder / name).read_bytes(), name


def sign(checkpoint_dir: Path, **changes) -> None:
    """Give a checkpoint's manifest the right checksums, and `changes`, as anyone could who has changed its files."""
    path = checkpoint_dir / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {name: digest(checkpoint_dir / name) for name in manifest["files"]}
    path.write_text(json.dumps(manifest | changes))


class StopAtStep:
    """Stands in for StopSignals: SIGTERM comes while a run makes its n-th step since it was started."""

    def __init__(self, step: int):
        self.left = step

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    @property
    def received(self) -> int | None:
        self.left -= 1
        return 15 if self.left <= 0 else None
