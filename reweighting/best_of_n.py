"""Choose the best of N candidate answers to each question, and report how well that works.

python reweighting/best_of_n.py --weights_path weights --candidates_json_file data/test.json --output selections.json
"""

if __name__ == "__main__":  # a script: run this file as a module of the package
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from reweighting.entrypoint import run_command

    run_command("reweighting.best_of_n")

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice, zip_longest
from pathlib import Path

from reweighting.config.inference import BestOfNConfig
from reweighting.data.chains import candidate_chains
from reweighting.data.row_files import iterate_rows
from reweighting.data.schema import CandidateRow
from reweighting.errors import UserError
from reweighting.files import atomic_write_text
from reweighting.inference.best_of_n_metrics import BestOfNResults, measure, results_table, warnings
from reweighting.inference.candidate_file import CandidateFile
from reweighting.inference.candidates import score_candidates
from reweighting.inference.scorer import Scorer
from reweighting.inference.selections_file import Selections, sidecar
from reweighting.modeling.aggregation import AggregationName, aggregate
from reweighting.modeling.chain_checks import check_chains
from reweighting.progress import Progress
from reweighting.tables import print_table
from reweighting.terminal import printable

AFTER_INTERRUPT = "the same command resumes there"
LESS_MEMORY = "Lower --batch_size"
BATCHES_IN_A_BLOCK = 8  # batches between two writes: enough for questions of like length to meet
SHOWN = 10  # choices that are printed where nobody knows which answers are correct


def main(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: the flags.

    Raises:
        UserError: for what the user can fix.
    """
    config = BestOfNConfig.parse(argv)
    output = Path(config.selections.output)
    sources = config.reading.sources(config.candidates.candidates_json_file)
    candidates = CandidateFile.read(sources, config.reading.options(), config.scoring.image_root)
    for warning in candidates.warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    scorer = Scorer(config.scoring, config.candidates.aggregation_function)
    if config.selections.drop_too_long:
        candidates = candidates.without_too_long(scorer.model.chain_tokenizer)
        if candidates.left_out:
            print(f"--drop_too_long: {len(candidates.left_out)} of "
                  f"{len(candidates.left_out) + candidates.questions} questions are left out, of which an answer is "
                  f"longer than {scorer.model.chain_tokenizer.max_length} tokens")  # fmt: skip
    settings = {**scorer.identity(), **candidates.identity(), "batch_size": config.scoring.batch_size}
    begun, checked = output.exists(), config.selections.drop_too_long
    if not begun and not checked:
        check(scorer, candidates)  # before anything is written
    selections = Selections(output, settings)
    if not selections.finished:
        if begun and not checked:
            check(scorer, candidates, selections.done)
        score(scorer, candidates, selections, config.scoring.batch_size)
    choices = pairs(candidates.rows(), iterate_rows(output), output)
    report(measure(choices, scorer.aggregation, candidates.largest), candidates.questions, scorer.aggregation, output)


def check(scorer: Scorer, candidates: CandidateFile, done: int = 0) -> None:
    """Check that the model can take every answer of the rows behind the first `done`."""
    todo = islice(candidates.rows(), done, None)
    tokenizer = scorer.model.chain_tokenizer
    chains = (chain for row in todo for chain in candidate_chains(row, candidates.path))
    check_chains(tokenizer, chains, purpose="choose without these questions")


def score(scorer: Scorer, candidates: CandidateFile, selections: Selections, batch_size: int) -> None:
    """Score the rows that the selections lack, and write them as they come.

    Rows are scored in the same batches wherever an earlier run was interrupted: scores are equal to the bit.
    """
    with Progress(candidates.questions, selections.done, unit="question") as progress:
        end = 0
        for block in blocks(candidates.rows(), BATCHES_IN_A_BLOCK * batch_size):
            start, end = end, end + len(block)
            if end > selections.done:
                selections.keep(start)
                selections.append(select(scorer, block, batch_size, candidates.path))
                progress.update(end - progress.count)
    selections.finish()


def blocks(rows: Iterator[CandidateRow], size: int) -> Iterator[list[CandidateRow]]:
    """Group the rows into lists of about `size` candidates together."""
    block: list[CandidateRow] = []
    for row in rows:
        block.append(row)
        if sum(len(member.candidates) for member in block) >= size:
            yield block
            block = []
    if block:
        yield block


def select(scorer: Scorer, rows: list[CandidateRow], batch_size: int, source: str) -> list[dict]:
    """Score the candidates of some rows and choose.

    Returns:
        A row of the output for each row.
    """
    with scorer.autocast():
        scored = score_candidates(scorer.model, rows, batch_size, source)
    chosen = []
    for row, (z, mask) in zip(rows, scored, strict=True):
        aggregates = aggregate(z, mask, scorer.aggregation)
        # Scores in double precision: logits can be read off them again.
        scores = [s[m].tolist() for s, m in zip(z.double().sigmoid(), mask, strict=True)]
        best = int(aggregates.argmax())
        chosen.append({"id": row.id, "chosen": best, "aggregates": aggregates.tolist(), "scores": scores})
    return chosen


def pairs(rows: Iterator[CandidateRow], choices: Iterator[dict], output: Path) -> Iterator[tuple[CandidateRow, dict]]:
    """Pair each row with its choice.

    Raises:
        UserError: if the output has been changed since it was written.
    """
    for row, choice in zip_longest(rows, choices):
        try:
            fits = row.id == choice["id"] and len(row.candidates) == len(choice["scores"])
        except (AttributeError, TypeError, KeyError):
            fits = False
        if not fits:
            raise UserError(f"--output {output}: was changed after it was written. Move it away to choose anew.")
        yield row, choice


def report(results: BestOfNResults, questions: int, aggregation: AggregationName, output: Path) -> None:
    """Write beside the output, and print, what each way of choosing gets; or a few choices if that is not known."""
    path = sidecar(output, ".metrics")
    if results.best_of:
        content = {"aggregation_function": aggregation, **asdict(results)}
        atomic_write_text(path, json.dumps(content, indent=1) + "\n")
    print(f"{questions} questions, choices by {aggregation}: {printable(output, one_line=True)}")
    if results.best_of:
        print_table(results_table(results))
        print(f"the same as JSON: {printable(path, one_line=True)}")
    else:
        print("no accuracy: it is not known of any candidate whether it is correct (`true_false`, or `ground_truth` "
              "and a stated answer)")  # fmt: skip
        for choice in islice(iterate_rows(output), SHOWN):
            best, number = choice["aggregates"][choice["chosen"]], choice["chosen"]
            name = printable(str(choice["id"])[:60], one_line=True)
            print(f"  {name}: candidate {number} of {len(choice['scores'])} (from 0), aggregate {best:.3f}")
    for warning in warnings(results):
        print(f"warning: {warning}")
