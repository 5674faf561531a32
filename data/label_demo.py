"""Make data/rollouts: a demo in which nothing is simulated, and the questions of `make pipeline`.

    python data/label_demo.py                                       # all of it again, two hours of one core
    python data/label_demo.py --parallel 8 --concurrency 1024       # on a GPU, minutes
    python data/label_demo.py --output_dir /tmp/demo --scale 0.02   # a quick try

The policy in `data/policy` answers questions about pictures, and `dreamprm label` labels its steps by rollouts. The
training rows come from ten domains, one for each kind of picture; `demo_world/causes.py` says what went wrong in each.
`held_out.json` (step rows), `meta.json` and `test.json` are clean and of all ten kinds; no two files share a picture.
`questions.jsonl` are questions to try `dreamprm label` on. `quality.json` holds the causes; the worth of each domain
that stands there too is measured by `benchmarks/rollout_demo.py`. No training code reads it.

What the policy has answered is kept in `--work`: an interrupted run goes on there.
"""

import argparse
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from demo_world.causes import CAUSES, CLEAN, Cause, ask
from demo_world.pictures import KINDS
from demo_world.solutions import random_kind
from make_demo import remove_pictures, write_rows

ROOT = Path(__file__).resolve().parent.parent
LABEL = [sys.executable, "reweighting/label.py"]
RECIPE = "data/policy/label.yaml"  # how the policy is asked
TRAIN_QUESTIONS = 100  # of each domain
ROLLOUTS = 16  # from each beginning of an answer
CONCURRENCY = 128  # texts that are written at a time
HELD_OUT, META, TEST, UNANSWERED = 100, 250, 500, 40  # questions


@dataclass(frozen=True)
class Part:
    """Some questions of the demo, and how they are answered.

    Attributes:
        name: of the part; a domain's part has the domain's.
        questions: how many.
        output: what label.py makes of it.
        answers: to each question.
        cause: what went wrong.
    """

    name: str
    questions: int
    output: str
    answers: int
    cause: Cause = CLEAN


PARTS = [Part(name, TRAIN_QUESTIONS, "train", 2, cause) for name, cause in CAUSES.items()] + [
    Part("held_out", HELD_OUT, "train", 2),
    Part("meta", META, "meta", 4),
    Part("test", TEST, "candidates", 8),
]


def write_questions(part: Part, scale: float, folder: Path, file: Path, seed: int) -> Path:
    """Draw a part's questions and their pictures, and write them into a file."""
    rng = Random(f"{seed} {part.name}")  # a stream of its own: no part changes another
    pictures = folder / "images" / part.name
    pictures.mkdir(parents=True, exist_ok=True)
    remove_pictures(pictures)
    rows = []
    for number in range(max(2, round(part.questions * scale))):
        kind = KINDS.get(part.name) or random_kind(rng)
        asked = ask(kind, part.cause, rng)
        path = pictures / f"{number:04d}.png"
        asked.picture.quantize(32).save(path, optimize=True)
        image = path.relative_to(folder).as_posix()
        rows.append({"id": str(number), "question": asked.text, "ground_truth": str(asked.ground_truth),
                     "images": [image], "dataset": kind.name})  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def label(part: Part, questions: Path, folder: Path, work: Path, concurrency: int = CONCURRENCY) -> list[dict]:
    """Let the policy answer a part's questions, and label its steps: the canonical rows."""
    rows = work / f"{part.name}.jsonl"
    flags = {"recipe": RECIPE, "temperature": part.cause.temperature, "answers": part.answers,
             "rollouts": ROLLOUTS, "concurrency": concurrency, "max_rows_per_domain": 0, "image_root": folder,
             "store": work / f"{part.name}.sqlite", f"output_{part.output}": rows}  # fmt: skip
    command = [*LABEL, str(questions), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    subprocess.run(command, check=True, cwd=ROOT)
    return [json.loads(line) for line in rows.read_text().splitlines()]


def image_of(row: dict) -> str:
    """The path of a row's picture from the demo's folder."""
    path = row["images"][0]  # from the work folder, whose way to the demo may lead through other folders of that name
    return path[path.rindex("images/") :]


def step_rows(rows: list[dict]) -> list[dict]:
    """One row for each labelled step."""
    return [{"id": row["id"], "input": row["question"], "add": "\n".join(row["steps"][: step + 1]),
             "ground_truth": row["ground_truth"], "image_path": image_of(row), "dataset": row["dataset"],
             "score": score, "times": times, "accuracy": score / times}
            for row in rows
            for step, (score, times) in enumerate(zip(row["score"], row["times"], strict=True)) if times]  # fmt: skip


def meta_rows(rows: list[dict]) -> list[dict]:
    """Whole answers, half of them correct."""
    return [{"id": row["id"], "true_false": row["final_answer_correct"],
             "input": "\n".join([row["question"], *row["steps"]]), "image_path": image_of(row)}
            for row in rows]  # fmt: skip


def test_rows(rows: list[dict]) -> list[dict]:
    """Questions with their candidate answers. An answer that states no number is incorrect."""
    questions: dict[str, list[dict]] = {}
    for row in rows:
        questions.setdefault(row["id"], []).append(row)
    return [{"id": id, "input": answers[0]["question"], "image_path": image_of(answers[0]),
             "ground_truth": answers[0]["ground_truth"],
             "candidates": ["\n".join(row["steps"]) for row in answers],
             "true_false": [row["final_answer_correct"] is True for row in answers]}
            for id, answers in questions.items()]  # fmt: skip


def label_demo(folder: Path, work: Path, seed: int, scale: float, parallel: int, concurrency: int) -> None:
    """Write the demo into `folder`, with this share of its questions."""
    work.mkdir(parents=True, exist_ok=True)
    write_questions(Part("questions", UNANSWERED, "", 0), scale, folder, folder / "questions.jsonl", seed)
    files = {part: write_questions(part, scale, folder, work / f"{part.name}.questions.jsonl", seed) for part in PARTS}
    with ThreadPoolExecutor(parallel) as pool:
        found = pool.map(lambda part: label(part, files[part], folder, work, concurrency), files)
        labelled = dict(zip(files, found, strict=True))
    rows = {part.name: found for part, found in labelled.items()}
    made = {
        "train": [row for name in CAUSES for row in step_rows(rows[name])],
        "held_out": step_rows(rows["held_out"]),
        "meta": meta_rows(rows["meta"]),
        "test": test_rows(rows["test"]),
    }
    for name, content in made.items():
        write_rows(folder / f"{name}.json", content)
    quality = {name: asdict(cause) for name, cause in CAUSES.items()}
    (folder / "quality.json").write_text(json.dumps(quality, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "data" / "rollouts")
    parser.add_argument("--work", type=Path, help="what the policy has answered (default: labels/ in --output_dir)")
    parser.add_argument("--seed", type=int, default=1, help="of the questions")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the questions")
    parser.add_argument("--parallel", type=int, default=1, help="label commands at a time")
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY, help="texts at a time in each of them")
    args = parser.parse_args()
    for name in ("scale", "parallel", "concurrency"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name}: found {getattr(args, name)}, allowed: a number of more than 0")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    folder = args.output_dir.resolve()
    work = (args.work or folder / "labels").resolve()
    try:
        label_demo(folder, work, args.seed, args.scale, args.parallel, args.concurrency)
    except subprocess.CalledProcessError as error:  # label.py has printed the reason
        raise SystemExit(max(error.returncode, 1)) from None


if __name__ == "__main__":
    main()
