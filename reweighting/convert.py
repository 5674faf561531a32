"""Convert answers of any known format to canonical rows, and report what is in them.

python reweighting/convert.py ProcessBench/*.json --output processbench.jsonl
"""

if __name__ == "__main__":  # a script: run this file as a module of the package
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from reweighting.entrypoint import run_command

    run_command("reweighting.convert")

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from reweighting.config.conversion import ConvertConfig
from reweighting.data.load_answers import Answer, LoadReport
from reweighting.data.published_answers import iterate_any_answers
from reweighting.data.summary import Summary
from reweighting.errors import UserError
from reweighting.files import atomic_file, check_not_inputs
from reweighting.terminal import printable

AFTER_INTERRUPT = "nothing has been written"
LESS_MEMORY = "Convert fewer files at a time"
TABLE_ROWS = 1024  # of a Parquet file that are written at a time


def main(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: the files, and the flags.

    Raises:
        UserError: for what the user can fix.
    """
    config = ConvertConfig.parse(argv)
    report, summary = LoadReport(), Summary()
    output = None if config.conversion.output is None else Path(config.conversion.output)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    rows = canonical_rows(config, report, summary, output)
    if output is None:
        for _ in rows:
            pass
    elif output.suffix == ".parquet":
        write_table(output, rows)
    else:
        with atomic_file(output) as file:
            for row in rows:
                kept = {name: value for name, value in row.items() if value is not None and value != []}
                file.write(json.dumps(kept, ensure_ascii=False).encode() + b"\n")
    for line in (*summary.lines(report), *report.notes()):
        print(printable(line))
    if output is not None:
        print(f"written     {printable(output, one_line=True)}")


def canonical_rows(
    config: ConvertConfig, report: LoadReport, summary: Summary, output: Path | None
) -> Iterator[dict[str, Any]]:
    """Read the answers, count them, and show some.

    Yields:
        The fields of a canonical row for each answer.

    Raises:
        UserError: anything is wrong, or there is no answer.
    """
    sources = config.reading.sources(config.conversion.inputs)
    if output is not None:
        check_not_inputs([output], [*(one.path for one in sources), config.reading.questions_json_file])
    for source in sources:
        for answer in iterate_any_answers(source, config.conversion.image_root, config.reading.options(), report):
            if summary.answers < config.conversion.sample:
                print(printable(shown(answer)))
            summary.add(answer)
            yield canonical_row(answer, output)
    if not summary.answers:
        raise UserError("\n".join([f"{sources[0].path}: no answer can be used.", *report.notes()]))


def canonical_row(answer: Answer, output: Path | None) -> dict[str, Any]:
    """Return the fields of a canonical row; image paths start from the output's folder where they can."""
    folder = Path.cwd() if output is None else output.parent.resolve()
    images = [os.path.relpath(image, folder) for image in answer.images]
    if len(images) < len(answer.image_names):  # one is missing: it keeps the name that it has, and its place
        places = [(name, Path(answer.source).parent / name) for name in answer.image_names]
        images = [os.path.relpath(place, folder) if place.is_file() else name for name, place in places]
    labelled = any(label is not None for label in answer.labels)
    return {
        "id": None if answer.id is None else str(answer.id),
        "question": answer.question,
        "images": images,
        "steps": list(answer.steps),
        "labels": list(answer.labels) if labelled else None,
        "final_answer_correct": answer.correct(),
        "answer": answer.answer,
        "ground_truth": None if answer.ground_truth is None else str(answer.ground_truth),
        "dataset": answer.domain,
    }


def shown(answer: Answer) -> str:
    """Return an answer as the model reads it, each step with its label, as text."""
    head = [f"{answer.source}: row {answer.index}, domain {answer.domain}, correct: {answer.correct()}"]
    steps = []
    for label, step in zip(answer.labels, answer.steps, strict=True):
        value = "    ?" if label is None else f"{label:5.2f}"
        steps.append(f"  {value} | " + step.replace("\n", "\n        | "))
    return "\n".join([*head, *map(str, answer.images), answer.question, *steps, ""])


def write_table(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write the rows as a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.list_(pyarrow.string())
    kinds = {"images": texts, "steps": texts, "labels": pyarrow.list_(pyarrow.float64()),
             "final_answer_correct": pyarrow.bool_()}  # fmt: skip
    names = ("id", "question", "images", "steps", "labels", "final_answer_correct", "answer", "ground_truth", "dataset")
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in names])
    with atomic_file(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as table:
        while block := list(islice(rows, TABLE_ROWS)):
            table.write_table(pyarrow.Table.from_pylist(block, schema))
