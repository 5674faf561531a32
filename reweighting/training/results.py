"""What a run leaves: the reward model, the weights as JSON, a table of them, and figures."""

import json
from pathlib import Path

from reweighting.distributed import collectives
from reweighting.files import atomic_write_dir, atomic_write_text
from reweighting.plots import draw_run, shown_name
from reweighting.terminal import printable
from reweighting.training.checkpoints import best_checkpoint
from reweighting.training.engine import ReweightingEngine


def save_results(engine: ReweightingEngine, folder: Path) -> None:
    """Write `prm/`, `domain_weights.json` and `figures/`, and print the weights; every process calls it, rank 0 writes.

    Args:
        engine: the engine of the finished run.
        folder: the output folder.

    Raises:
        UserError: if something cannot be written.
    """
    save_model = engine.model_saver()
    if not collectives.is_rank0():
        return
    atomic_write_dir(folder / "prm", save_model)
    weights = engine.weights()
    result = {"weights": weights, "step": engine.global_step, "settings": engine.settings}
    atomic_write_text(folder / "domain_weights.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    figures = draw_run(folder)
    if engine.reweights:
        print(f"\ndomain weights after {engine.global_step} steps, {engine.updates} updates (mean 1):")
        print(weights_table(weights))
    best = best_checkpoint(folder / "checkpoints", engine.score_name)
    if best is not None:
        print(f"\nbest checkpoint by {printable(engine.score_label)} ({best[1]:.4f}): {printable(best[0])}")
    print(printable(f"\nreward model in {folder / 'prm'}, figures: {', '.join(map(str, figures))}"))


def weights_table(weights: dict[str, float]) -> str:
    """Format the weights as lines of text with bars, largest first."""
    names = {domain: shown_name(domain) for domain in weights}
    width = max(map(len, names.values()))
    rows = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(f"  {names[name]:<{width}}  {weight:5.2f}  {'█' * round(20 * weight)}" for name, weight in rows)
