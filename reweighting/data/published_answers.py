"""Rows of the published formats as answers, for what treats all formats alike."""

import math
from collections.abc import Iterator
from pathlib import Path

from reweighting.data.answers import candidate_correctness
from reweighting.data.chains import Chain, candidate_chains, meta_chains, training_chains
from reweighting.data.load_answers import Answer, LoadReport, format_of, iterate_answers
from reweighting.data.load_rows import iterate_candidate_rows, iterate_training_rows, load_meta_rows
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.row_files import short_repr
from reweighting.data.sources import Source
from reweighting.errors import UserError

NO_MARKER = "it has no `Step N` marker, so the end of its question is not known"


def iterate_any_answers(
    source: Source, image_root: str | Path | None, options: ReadingOptions, report: LoadReport
) -> Iterator[Answer]:
    """Read the answers of a source of any format; images that are missing are counted in the published ones' errors.

    Args:
        source, image_root, options, report: as in `load_answers.iterate_answers`.

    Raises:
        UserError: anything is wrong, or the format is not known.
    """
    name = format_of(source)
    if name is None:
        raise UserError(f"{source.path}: row 0 is of no known format: {short_repr(next(source.rows()))}. Name it "
                        "with --format, or give it `question` and `steps`.")  # fmt: skip
    report.formats[source.path] = name
    if name == "training":
        rows = list(iterate_training_rows(source, image_root, options))
        chains, domains = training_chains(rows, source.path, options.step_separator)
        report.rows += len(rows)
        for chain in chains:
            row = rows[chain.rows[0]]
            yield _answer(chain, report, domains[chain.domain], None, row.id, row.ground_truth)
    elif name == "meta":
        metas = load_meta_rows(source, image_root, options, one_class=True)
        chains, stepless = meta_chains(metas, source.path, options.step_separator, one_class=True)
        report.rows += len(metas)
        if stepless:
            report.left_out[source.path, NO_MARKER] += stepless
        for chain in chains:
            yield _answer(chain, report, source.domain or source.name, chain.label == 1, metas[chain.rows[0]].id)
    elif name == "candidates":
        for row in iterate_candidate_rows(source, image_root, options):
            report.rows += 1
            correct = candidate_correctness(row) or [None] * len(row.candidates)
            for chain, known in zip(candidate_chains(row, source.path), correct, strict=True):
                yield _answer(chain, report, source.domain or source.name, known, row.id, row.ground_truth)
    else:
        yield from iterate_answers(source, image_root, options, report, require_images=False)


def _answer(
    chain: Chain, report: LoadReport, domain: str, correct: bool | None, id: int | str | None, truth: object = None
) -> Answer:
    report.answers += 1
    labels = tuple(None if math.isnan(target) else target for target in chain.targets) or (None,) * len(chain.steps)
    return Answer(
        chain.question, chain.images, chain.steps, labels, domain, correct, id, None, truth, chain.rows[0],
        chain.source, tuple(map(str, chain.images)),
    )  # fmt: skip
