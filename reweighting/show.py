"""Look at one question: its candidates, their steps coloured by score, and the choice, as one HTML page.

python reweighting/show.py --weights_path weights --candidates_json_file data/test.json --id 3 --output answer.html
"""

if __name__ == "__main__":  # a script: run this file as a module of the package
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from reweighting.entrypoint import run_command

    run_command("reweighting.show")

import sys
from contextlib import suppress
from pathlib import Path

from reweighting.config.inference import ShowConfig
from reweighting.data.answers import candidate_correctness
from reweighting.data.chains import candidate_chains
from reweighting.data.load_answers import LoadReport
from reweighting.data.load_chains import iterate_candidates
from reweighting.data.schema import CandidateRow
from reweighting.errors import UserError
from reweighting.files import atomic_write_text
from reweighting.inference.candidates import score_candidates
from reweighting.inference.html_page import PageCandidate, html_page, is_own_page
from reweighting.inference.scorer import Scorer
from reweighting.modeling.aggregation import aggregate
from reweighting.terminal import printable

AFTER_INTERRUPT = "nothing has been written"
LESS_MEMORY = "Lower --batch_size"


def main(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: the flags.

    Raises:
        UserError: for what the user can fix.
    """
    config = ShowConfig.parse(argv)
    output, source = Path(config.page.output), config.candidates.candidates_json_file[0]
    row = find_row(config)
    try:
        if output.exists() and not (output.is_file() and is_own_page(output)):
            raise UserError(f"--output {output}: is there and no page of show.py. Name another, or move it away.")
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from error
    scorer = Scorer(config.scoring, config.candidates.aggregation_function)
    with scorer.autocast():
        z, mask = score_candidates(scorer.model, [row], config.scoring.batch_size, source)[0]  # [N, S]
    aggregates = aggregate(z, mask, scorer.aggregation)
    chains = candidate_chains(row)
    correct = candidate_correctness(row) or [None] * len(chains)
    candidates = [
        PageCandidate(
            number + 1,
            list(zip(chain.steps, z[number][mask[number]].sigmoid().tolist(), strict=True)),
            float(aggregates[number]),
            correct[number],
        )
        for number, chain in enumerate(chains)
    ]
    chosen = int(aggregates.argmax()) + 1
    page = html_page(chains[0].question, row.image_files, candidates, chosen, scorer.aggregation)
    try:
        atomic_write_text(output, page)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from error
    print(f"{printable(output, one_line=True)}: candidate {chosen} of {len(chains)} is chosen")


def find_row(config: ShowConfig) -> CandidateRow:
    """Find the first row of an id, and warn if there are others.

    Raises:
        UserError: if there is none.
    """
    files, options, wanted = config.candidates.candidates_json_file, config.reading.options(), config.page.id
    sources, root = config.reading.sources(files), config.scoring.image_root
    rows = iterate_candidates(sources, root, options, LoadReport(), decode_images=False)
    found = next((row for row in rows if str(row.id) == wanted), None)
    if found is None:
        raise UserError(f"{files[0]}: no row has the id {wanted[:60]}. Ids are the rows' `id` fields.")
    count = 1
    with suppress(UserError):  # a faulty row that is not shown ends the search
        for row in rows:
            count += str(row.id) == wanted
    if count > 1:
        shown = printable(wanted[:60], one_line=True)
        print(f"warning: {count} rows have the id {shown}; the first is shown", file=sys.stderr)
    return found
