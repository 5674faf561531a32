"""Evaluate a reward model step by step, on rows with step labels.

python reweighting/evaluate.py --weights_path weights --eval_json_file held_out.json --output evaluation
"""

import json
import math

if __name__ == "__main__":  # a script: run this file as a module of the package
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from reweighting.entrypoint import run_command

    run_command("reweighting.evaluate")

from pathlib import Path

from reweighting.config.inference import EVALUATE, parse_inference_arguments
from reweighting.data.load_rows import load_evaluation_rows
from reweighting.entrypoint import run_command
from reweighting.errors import UserError

AFTER_INTERRUPT = "nothing has been written"


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    args = parse_inference_arguments("evaluate.py", __doc__, EVALUATE, argv)
    rows = load_evaluation_rows(args.eval_json_file, args.image_root)
    dev_source = args.dev_json_file or args.eval_json_file
    dev_rows = load_evaluation_rows(args.dev_json_file, args.image_root) if args.dev_json_file else None

    from reweighting.inference.metrics import reliability
    from reweighting.inference.scorer import Scorer
    from reweighting.inference.step_metrics import (
        check_labels,
        choose_thresholds,
        evaluate_domains,
        score_rows,
        split,
        table,
    )
    from reweighting.plots import draw_reliability

    if dev_rows is None:
        dev_rows, rows = split(rows)
        if not dev_rows or not rows:
            raise UserError(f"{args.eval_json_file}: too few questions to split; name others with --dev_json_file.")
    check_labels(dev_rows, args.threshold, dev_source)
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written: {error.strerror or error}") from error
    scorer = Scorer(args)
    with scorer.autocast():
        dev = score_rows(scorer.model, dev_rows, args.threshold, args.batch_size, dev_source)
        chains = score_rows(scorer.model, rows, args.threshold, args.batch_size, args.eval_json_file)
    thresholds = choose_thresholds(dev)
    results = evaluate_domains(chains, thresholds)
    scores = [score for chain in chains for score in chain.scores]
    bins = reliability(scores, [accuracy for chain in chains for accuracy in chain.accuracies])
    draw_reliability(bins, results["all"]["calibration_error"], folder / "reliability.png")
    content = {
        "settings": vars(args),
        "thresholds": thresholds | {"chosen_on_chains": len(dev)},
        "results": results,
        "reliability": bins,
    }
    path = folder / "evaluation.json"
    path.write_text(json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(table(results))
    print(f"PB: ProcessBench, the first wrong step. Thresholds from {len(dev)} other chains. {path}, reliability.png")


def _without_nan(value):
    """The value with null for every number that is not defined, which JSON cannot carry."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
