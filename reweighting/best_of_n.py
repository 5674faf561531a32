"""Choose the best of N candidate answers to each question, and report how well that works.

python reweighting/best_of_n.py --weights_path weights --candidates_json_file data/test.json --output selections.json
"""

if __name__ == "__main__":  # a script: run this file as a module of the package
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from reweighting.entrypoint import run_command

    run_command("reweighting.best_of_n")

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from reweighting.config.inference import BEST_OF_N, parse_inference_arguments
from reweighting.data.load_rows import iterate_candidate_rows
from reweighting.data.row_files import iterate_rows
from reweighting.data.schema import CandidateRow
from reweighting.entrypoint import run_command
from reweighting.errors import UserError

AFTER_INTERRUPT = "the same command continues from there"
BATCHES_IN_A_BLOCK = 8  # batches between two writes: enough for questions of like length to meet
SHOWN = 10  # choices in the table where nobody knows which answers are right


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    args = parse_inference_arguments("best_of_n.py", __doc__, BEST_OF_N, argv)
    count = sum(1 for _ in iterate_candidate_rows(args.candidates_json_file, args.image_root))

    from reweighting.data.chains import candidate_chains
    from reweighting.files import digest
    from reweighting.inference.scorer import Scorer, model_folder
    from reweighting.inference.selections_file import Selections

    scorer = Scorer(args)
    files = sorted(path for path in model_folder(args.weights_path).iterdir() if path.is_file())
    settings = {
        "reward model": digest(*files),
        "input": digest(Path(args.candidates_json_file)),
        "aggregation_function": scorer.aggregation,
        "precision": scorer.precision,
    }
    selections = Selections(Path(args.output), settings)
    if not selections.finished:
        rows = rest(args, selections)
        scorer.model.check(chain for row in rows for chain in candidate_chains(row, args.candidates_json_file))
        score_rest(scorer, args, selections, count)
    print(f"{count} questions, choices by {scorer.aggregation}: {args.output}")
    report(args, scorer.aggregation, Path(args.output))


def score_rest(scorer, args, selections, count: int) -> None:
    """Score the rows that the selections lack, and write them as they come."""
    from tqdm import tqdm

    if selections.done:
        print(f"{args.output}: {selections.done} of {count} questions are there; going on behind them")
    with tqdm(total=count, initial=selections.done, unit=" questions", mininterval=1) as bar:
        for block in blocks(rest(args, selections), BATCHES_IN_A_BLOCK * args.batch_size):
            selections.append(select(scorer, block, args.batch_size, args.candidates_json_file))
            bar.update(len(block))
    selections.finish()


def rest(args, selections) -> Iterator[CandidateRow]:
    """The rows that the selections lack. The file and its images have been checked before."""
    rows = iterate_candidate_rows(args.candidates_json_file, args.image_root, decode_images=False)
    return (row for row in rows if row.index >= selections.done)


def blocks(rows: Iterator[CandidateRow], size: int) -> Iterator[list[CandidateRow]]:
    """The rows in lists of about `size` candidates together."""
    block: list[CandidateRow] = []
    for row in rows:
        block.append(row)
        if sum(len(member.candidates) for member in block) >= size:
            yield block
            block = []
    if block:
        yield block


def select(scorer, rows: list[CandidateRow], batch_size: int, source: str) -> list[dict]:
    """A row of the output for each row."""
    from reweighting.inference.candidates import score_candidates
    from reweighting.modeling.aggregation import aggregate

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
    """Each row with its choice. Raises UserError if the output has been changed since it was written."""
    for row, choice in zip_longest(rows, choices):
        try:
            fits = row.id == choice["id"] and len(row.candidates) == len(choice["scores"])
        except (AttributeError, TypeError, KeyError):
            fits = False
        if not fits:
            raise UserError(f"--output {output}: does not hold what was written. Move it away to choose anew")
        yield row, choice


def report(args, aggregation: str, output: Path) -> None:
    """Print, and write beside the output, what each way of choosing gets; or a few choices if that is not known."""
    import json

    from reweighting.inference.best_of_n_metrics import measure, table
    from reweighting.inference.selections_file import sidecar

    rows = iterate_candidate_rows(args.candidates_json_file, args.image_root, decode_images=False)
    results = measure(pairs(rows, iterate_rows(output), output), aggregation)
    if not results:
        print("no row says which candidates are right (`true_false`, or `ground_truth` and `Final answer:`)")
        for chosen, _ in zip(iterate_rows(output), range(SHOWN), strict=False):
            best = chosen["aggregates"][chosen["chosen"]]
            print(f"  {chosen['id']}: candidate {chosen['chosen']} of {len(chosen['scores'])}, aggregate {best:.3f}")
        return
    print(table(results))
    path = sidecar(output, ".metrics")
    path.write_text(json.dumps({"aggregation_function": aggregation, "best_of": results}, indent=1) + "\n")
    print(f"the same as JSON: {path}")
