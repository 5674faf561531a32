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
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reweighting.config.inference import EvaluateConfig
from reweighting.data.load_chains import LabelledChain, load_evaluation, shared_questions
from reweighting.errors import UserError
from reweighting.files import atomic_write_text, check_not_inputs
from reweighting.inference.metrics import reliability
from reweighting.inference.scorer import Scorer
from reweighting.inference.step_metrics import (
    check_labels,
    choose_thresholds,
    evaluate_domains,
    results_table,
    score_chains,
    split_dev,
)
from reweighting.modeling.chain_checks import check_chains
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.plots import draw_reliability
from reweighting.tables import print_table
from reweighting.terminal import printable

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
    config = EvaluateConfig.parse(argv)
    batch_size = config.scoring.batch_size
    json_path, figure_path = output_files(config)
    labelled = load(config, config.evaluation.eval_json_file)
    if config.evaluation.dev_json_file is not None:
        dev_labelled = load(config, config.evaluation.dev_json_file)
        warn_of_shared(dev_labelled, labelled)
    else:
        dev_labelled, labelled = split_dev(labelled)
        if not dev_labelled or not labelled:
            raise UserError(f"{config.evaluation.eval_json_file[0]}: too few questions to split; name others with "
                            "--dev_json_file.")  # fmt: skip
    scorer = Scorer(config.scoring)
    dev_labelled, labelled = (
        fitting(scorer.model, part, config.evaluation.drop_too_long) for part in (dev_labelled, labelled)
    )
    warning = check_labels(dev_labelled, (config.evaluation.dev_json_file or config.evaluation.eval_json_file)[0])
    if warning is not None:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    with scorer.autocast():
        dev = score_chains(scorer.model, dev_labelled, batch_size)
        chains = score_chains(scorer.model, labelled, batch_size)
    thresholds = choose_thresholds(dev)
    results = evaluate_domains(chains, thresholds)
    scores = [score for chain in chains for score in chain.scores]
    bins = reliability(scores, [accuracy for chain in chains for accuracy in chain.accuracies])
    draw_reliability(bins, results["all"]["calibration_error"], figure_path)
    content = {
        "settings": asdict(config.evaluation) | asdict(config.reading) | asdict(config.scoring),
        "thresholds": thresholds | {"chosen_on_chains": len(dev)},
        "results": results,
        "reliability": bins,
    }
    atomic_write_text(json_path, json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n")
    print_table(results_table(results))
    print(f"thresholds: from {len(dev)} other answers; written: {printable(json_path, one_line=True)}, reliability.png")


def load(config: EvaluateConfig, files: list[str]) -> list[LabelledChain]:
    """Load the answers in some files, and warn of what is odd about them.

    Raises:
        UserError: for anything wrong.
    """
    sources, options = config.reading.sources(files), config.reading.options()
    chains, notes = load_evaluation(sources, config.scoring.image_root, options, config.evaluation.threshold)
    for note in notes:
        print(f"warning: {printable(note)}", file=sys.stderr)
    return chains


def fitting(model: ProcessRewardModel, chains: list[LabelledChain], drop_too_long: bool) -> list[LabelledChain]:
    """Check all answers before the first is scored, and return those that the model can take.

    Args:
        model: the reward model.
        chains: the answers.
        drop_too_long: leave out the answers that are too long, and print how many.

    Raises:
        UserError: if an answer cannot be scored; without `drop_too_long`, also if one is too long.
    """
    purpose = "evaluate without the answers that are too long"
    too_long = set(check_chains(model.chain_tokenizer, [one.chain for one in chains], drop_too_long, purpose))
    if too_long:
        print(f"--drop_too_long: {len(too_long)} of {len(chains)} answers are left out, which are longer than "
              f"{model.chain_tokenizer.max_length} tokens")  # fmt: skip
    return [one for place, one in enumerate(chains) if place not in too_long]


def warn_of_shared(dev: list[LabelledChain], labelled: list[LabelledChain]) -> None:
    """Warn of questions that thresholds are chosen on and measured with."""
    shared = shared_questions((one.chain for one in dev), (one.chain for one in labelled))
    if shared:
        print(f"warning: {shared} questions are among those that thresholds are chosen on", file=sys.stderr)


def output_files(config: EvaluateConfig) -> list[Path]:
    """Make the output folder and return the paths of FILES in it.

    Raises:
        UserError: if it cannot be written, or if a file to write is one of the inputs.
    """
    folder = Path(config.evaluation.output)
    paths = [folder / name for name in FILES]
    inputs = (config.evaluation.eval_json_file, config.evaluation.dev_json_file)
    check_not_inputs(paths, [source.path for files in inputs for source in config.reading.sources(files)])
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
