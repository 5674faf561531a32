"""Evaluate a reward model step by step, on rows with step labels.

python reweighting/evaluate.py --weights_path weights --eval_json_file held_out.json --output evaluation
"""

if __name__ == "__main__":  # a script: run this file as a module of the package
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from reweighting.entrypoint import run_command

    run_command("reweighting.evaluate")

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reweighting.config.inference import EvaluateConfig, parse_inference_config
from reweighting.data.load_rows import load_evaluation_rows
from reweighting.errors import UserError
from reweighting.files import atomic_write_text
from reweighting.inference.metrics import reliability
from reweighting.inference.scorer import Scorer
from reweighting.inference.step_metrics import (
    check_labels,
    choose_thresholds,
    evaluate_domains,
    results_table,
    score_rows,
    split_dev,
)
from reweighting.plots import draw_reliability
from reweighting.tables import print_table
from reweighting.terminal import printable

SUMMARY = "Evaluate a reward model step by step, on rows with step labels."
AFTER_INTERRUPT = "nothing has been written"
FILES = ("evaluation.json", "reliability.png")  # that it writes
LESS_MEMORY = "Lower --batch_size"


def main(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: the flags.

    Raises:
        UserError: for what the user can fix.
    """
    config = parse_inference_config(EvaluateConfig, argv, description=SUMMARY)
    source, dev_source = config.evaluation.eval_json_file, config.evaluation.dev_json_file
    threshold, batch_size = config.evaluation.threshold, config.scoring.batch_size
    json_path, figure_path = output_files(config)
    rows = load_evaluation_rows(source, config.scoring.image_root)
    if dev_source is not None:
        dev_rows = load_evaluation_rows(dev_source, config.scoring.image_root)
    else:
        dev_source = source
        dev_rows, rows = split_dev(rows)
        if not dev_rows or not rows:
            raise UserError(f"{source}: too few questions to split; name others with --dev_json_file.")
    check_labels(dev_rows, threshold, dev_source)
    scorer = Scorer(config.scoring)
    with scorer.autocast():
        dev = score_rows(scorer.model, dev_rows, threshold, batch_size, dev_source)
        chains = score_rows(scorer.model, rows, threshold, batch_size, source)
    thresholds = choose_thresholds(dev)
    results = evaluate_domains(chains, thresholds)
    scores = [score for chain in chains for score in chain.scores]
    bins = reliability(scores, [accuracy for chain in chains for accuracy in chain.accuracies])
    draw_reliability(bins, results["all"]["calibration_error"], figure_path)
    content = {
        "settings": asdict(config.evaluation) | asdict(config.scoring),
        "thresholds": thresholds | {"chosen_on_chains": len(dev)},
        "results": results,
        "reliability": bins,
    }
    atomic_write_text(json_path, json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n")
    print_table(results_table(results))
    print(f"thresholds: from {len(dev)} other answers; written: {printable(json_path, one_line=True)}, reliability.png")


def output_files(config: EvaluateConfig) -> list[Path]:
    """Make the output folder and return the paths of FILES in it.

    Raises:
        UserError: if it cannot be written, or if a file to write is one of the inputs.
    """
    folder = Path(config.evaluation.output)
    paths = [folder / name for name in FILES]
    for name in filter(None, (config.evaluation.eval_json_file, config.evaluation.dev_json_file)):
        if any(path.exists() and Path(name).exists() and path.samefile(name) for path in paths):
            raise UserError(f"--output {folder}: would overwrite the input {name}. Name another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written: {error.strerror or error}") from error
    return paths


def _without_nan(value: Any) -> Any:
    """The value with null for every number that is not defined, which JSON cannot carry."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
