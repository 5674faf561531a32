"""What a run leaves behind: the reward model, the weights as JSON, a table and figures."""

import itertools
import json
from pathlib import Path

from reweighting.engine import ReweightingEngine
from reweighting.errors import UserError
from reweighting.figures import draw_run

OUTPUTS = ("checkpoints", "history.jsonl", "domain_weights.json", "prm", "figures")


def prepare_folder(path: str, resume: bool) -> Path:
    """The output folder, made if it is missing. Unless the run resumes, what an earlier run left there is moved into
    `earlier-1`, `earlier-2`, …: nothing is lost, and nothing of two runs is mixed. Raises UserError if nothing can be
    written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_text("")
        probe.unlink()
        left = [folder / name for name in OUTPUTS if (folder / name).exists()]
        if left and not resume:
            place = next(p for n in itertools.count(1) if not (p := folder / f"earlier-{n}").exists())
            place.mkdir()
            for item in left:
                item.rename(place / item.name)
            print(f"what an earlier run left in {folder} is now in {place}")
    except OSError as error:
        raise UserError(f"--weights_path {folder}: cannot be written: {error.strerror or error}") from error
    return folder


def weights_table(weights: dict[str, float]) -> str:
    """The weights as lines of text, largest first."""
    width = max(map(len, weights))
    rows = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(f"  {name:<{width}}  {weight:5.2f}  {'█' * round(20 * weight)}" for name, weight in rows)


def finish(engine: ReweightingEngine, folder: Path) -> None:
    """Write `prm/`, `domain_weights.json` and `figures/` into the folder and print the sorted weights."""
    engine.lower.module.save_pretrained(folder / "prm")
    weights = engine.weights()
    result = {"weights": weights, "step": engine.global_step, "settings": engine.settings}
    (folder / "domain_weights.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    figures = draw_run(folder)
    if engine.reweights:
        print(f"\ndomain weights after {engine.global_step} steps, {engine.updates} updates (mean 1):")
        print(weights_table(weights))
    print(f"\nreward model in {folder / 'prm'}, figures: {', '.join(map(str, figures))}")
