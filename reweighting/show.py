"""Look at one question: its candidates, their steps coloured by score, and the choice, as one HTML page.

python reweighting/show.py --weights_path weights --candidates_json_file data/test.json --id 3 --output answer.html
"""

if __name__ == "__main__":  # a script: run this file as a module of the package
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from reweighting.entrypoint import run_command

    run_command("reweighting.show")

from pathlib import Path

from reweighting.config.inference import SHOW, parse_inference_arguments
from reweighting.data.load_rows import iterate_candidate_rows
from reweighting.data.schema import CandidateRow
from reweighting.entrypoint import run_command
from reweighting.errors import UserError

AFTER_INTERRUPT = "nothing has been written"


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    args = parse_inference_arguments("show.py", __doc__, SHOW, argv)
    row = find(args)

    from reweighting.data.answers import candidate_correctness
    from reweighting.data.chains import candidate_chains
    from reweighting.inference.candidates import score_candidates
    from reweighting.inference.html_page import page
    from reweighting.inference.scorer import Scorer
    from reweighting.modeling.aggregation import aggregate

    scorer = Scorer(args)
    with scorer.autocast():
        z, mask = score_candidates(scorer.model, [row], args.batch_size, args.candidates_json_file)[0]
    aggregates = aggregate(z, mask, scorer.aggregation)
    chains = candidate_chains(row)
    text = page(
        chains[0].question,
        row.image,
        [chain.steps for chain in chains],
        [s[m].tolist() for s, m in zip(z.sigmoid(), mask, strict=True)],
        aggregates.tolist(),
        int(aggregates.argmax()),
        scorer.aggregation,
        candidate_correctness(row),
    )
    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written: {error.strerror or error}") from error
    print(f"{args.output}: candidate {int(aggregates.argmax()) + 1} of {len(chains)} is chosen")


def find(args) -> CandidateRow:
    """The first row with the `id` that is asked for. Raises UserError if there is none."""
    for row in iterate_candidate_rows(args.candidates_json_file, args.image_root, decode_images=False):
        if str(row.id) == args.id:
            return row
    raise UserError(f"{args.candidates_json_file}: no row has the id {args.id}. Ids are the rows' `id` fields.")
