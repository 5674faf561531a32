"""How long a run takes to its first step, and how much memory: on the demo, and on large files of three forms.

    python benchmarks/scale.py --work /tmp/scale        # a few minutes and 2 GB of disk to make the data, once

`million`: a million training rows, five a chain, over 200,000 images. `canonical`: the same chains as canonical rows, a
row each. `parquet`: a table of canonical rows of one step with a picture inside each row. The demo runs with the
defaults, the large files with small batches and the demo's meta set. Files that were read a moment ago are in the
system's cache.
"""

import argparse
import json
import os
import resource
import sys
import time
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pyarrow
import pyarrow.parquet
from common import ROOT, run_case, write_results
from demo_world.pictures import KINDS, draw_picture
from demo_world.solutions import Policy, random_question
from memory import Watch

from reweighting.data.steps import split_response

DEMO = ROOT / "data" / "train.json"
FLAGS = {  # of the two runs
    "demo": ("--iteration_num", "20"),
    "million": ("--iteration_num", "160", "--batch_size", "4", "--meta_batch_size", "8"),
    "canonical": ("--iteration_num", "40", "--batch_size", "4", "--meta_batch_size", "8"),
    "parquet": ("--iteration_num", "160", "--batch_size", "4", "--meta_batch_size", "8"),
}
PICTURES = 200  # drawn; each of the others differs from one of these in its corner


def make_files(folder: Path, rows: int, images: int) -> Path:
    """`rows` training rows, five a chain, over `images` images, as JSON lines. Returns the file."""
    path = folder / f"train-{rows}-{images}.jsonl"
    if path.exists():
        return path
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, policy, kinds = Random(1), Policy(), list(KINDS.values())
    questions = [random_question(rng.choice(kinds), rng) for _ in range(PICTURES)]
    drawn = [draw_picture(q.kind, q.entries, rng).quantize(32) for q in questions]
    for number in range(images):
        picture = drawn[number % PICTURES]
        picture.putpixel((0, 0), number // PICTURES % 32)
        picture.save(folder / "images" / f"{number}.png")
    aside = path.with_suffix(".part")
    with open(aside, "w", encoding="utf-8") as file:
        for number in range(rows // 5):
            image = number % images
            question = questions[image % PICTURES]
            steps = policy.respond(question, rng).steps
            for step in range(5):
                row = {
                    "id": number,
                    "sid": step,
                    "input": f"{question.text} ({number})",
                    "add": "\n".join(steps[: step + 1]),
                    "image_path": f"images/{image}.png",
                    "dataset": question.kind.name,
                    "accuracy": rng.randrange(17) / 16,
                }
                file.write(json.dumps(row) + "\n")
    aside.rename(path)
    return path


def make_canonical(train: Path) -> Path:
    """The chains of training rows as canonical rows, as JSON lines. Returns the file."""
    path = train.with_name(f"canonical-{train.name}")
    if not path.exists():
        aside = path.with_suffix(".part")
        with open(train, encoding="utf-8") as rows, open(aside, "w", encoding="utf-8") as file:
            while five := [json.loads(line) for line in islice(rows, 5)]:
                last = five[-1]
                row = {"id": last["id"], "question": last["input"], "steps": split_response(last["add"]),
                       "labels": [row["accuracy"] for row in five], "images": [last["image_path"]],
                       "dataset": last["dataset"]}  # fmt: skip
                file.write(json.dumps(row) + "\n")
        aside.rename(path)
    return path


def make_table(train: Path, rows: int) -> Path:
    """`rows` canonical rows of one step, each with its picture inside, as a Parquet file. Returns the file."""
    path = train.with_name(f"table-{rows}.parquet")
    if not path.exists():
        aside = path.with_suffix(".part")
        texts, picture = pyarrow.list_(pyarrow.string()), pyarrow.struct({"bytes": pyarrow.binary()})
        kinds = {"question": pyarrow.string(), "steps": texts, "dataset": pyarrow.string(),
                 "labels": pyarrow.list_(pyarrow.float64()), "images": pyarrow.list_(picture)}  # fmt: skip
        schema = pyarrow.schema(kinds)
        with open(train, encoding="utf-8") as lines, pyarrow.parquet.ParquetWriter(aside, schema) as table:
            firsts = (json.loads(line) for line in islice(lines, 0, 5 * rows, 5))
            while block := list(islice(firsts, 1000)):
                table.write_table(pyarrow.Table.from_pylist([
                    {"question": row["input"], "steps": [row["add"]], "labels": [row["accuracy"]],
                     "images": [{"bytes": (train.parent / row["image_path"]).read_bytes()}], "dataset": row["dataset"]}
                    for row in block], schema))  # fmt: skip
        aside.rename(path)
    return path


def run(case: str, train: Path, started: float) -> None:
    """Train in this process; print the seconds to the first step, and the memory at its end and later on."""
    from reweighting import main as command

    class FirstStep(Watch):
        @property
        def received(self) -> None:
            super().received  # noqa: B018
            if Watch.steps == 1:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                found.update(seconds_to_first_step=time.time() - started, peak_gb_at_first_step=peak / 1e9)

        @received.setter
        def received(self, value) -> None:
            """There is never a signal."""

    found: dict = {}
    command.StopSignals = FirstStep  # what looks for signals after each step looks at the clock
    with TemporaryDirectory() as folder:
        command.main(["--train_json_file", str(train), "--meta_json_file", str(DEMO.with_name("meta.json")),
              "--weights_path", folder, *FLAGS[case]])  # fmt: skip
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    found["resident_mb_by_step"] = [(step, round(memory)) for step, memory in Watch.samples]
    print("RESULT " + json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/scale"), help="the data")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--table_rows", type=int, default=100_000)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # a run itself: case, file, when it was started
    args = parser.parse_args()
    if args.child:
        case, train, started = args.child
        run(case, Path(train), float(started))
        return
    result = {"rows": args.rows, "images": args.images, "table_rows": args.table_rows}
    large = make_files(args.work, args.rows, args.images)
    os.environ["DREAMPRM_CACHE"] = str(args.work / "cache")  # for the pictures of the table
    for case, train in {"demo": DEMO, "million": large, "canonical": make_canonical(large),
                        "parquet": make_table(large, args.table_rows)}.items():  # fmt: skip
        command = [sys.executable, __file__, "--child", case, str(train), str(time.time())]
        result[case] = {"flags": FLAGS[case], **run_case(command)}
        print(case, {name: value for name, value in result[case].items() if name != "resident_mb_by_step"})
    print(write_results("scale", result))


if __name__ == "__main__":
    main()
