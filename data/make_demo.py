"""Make the demo data: train.json, meta.json, test.json, quality.json and the images that they name.

    python data/make_demo.py                                          # every byte of data/ again
    python data/make_demo.py --output_dir /tmp/other --seed 7 --quality dice=0.1 map=1.0

Training rows come from ten domains, one for each kind of picture, each spoilt by one defect to a known degree
(`quality.json`, which no training code reads). Meta and test rows are clean and drawn from all ten kinds alike; the
two share no picture. See `demo_world/` for the pictures, the answers and the defects.
"""

import argparse
import json
import sys
from pathlib import Path
from random import Random

from demo_world.defects import LABEL_DEFECTS, strength
from demo_world.pictures import KINDS, Kind, draw_picture
from demo_world.solutions import Policy, Question, given_away, random_kind, random_question

# Domain -> quality. Each defect strikes two domains, one of them harder.
QUALITY = {
    "bar_chart": 0.9,
    "clocks": 0.1,
    "dice": 1.0,
    "geometry": 0.7,
    "map": 0.2,
    "pie_chart": 0.3,
    "price_tags": 0.8,
    "scoreboard": 0.0,
    "table": 0.6,
    "tally": 0.4,
}
DEFECT = {
    "bar_chart": "noisy labels",
    "clocks": "noisy labels",
    "dice": "flipped labels",
    "geometry": "foreign images",
    "map": "answers given away",
    "pie_chart": "foreign images",
    "price_tags": "answers given away",
    "scoreboard": "flipped labels",
    "table": "trivial questions",
    "tally": "trivial questions",
}
RESPONSES = 2  # training responses to each question
TIMES = 16  # Monte Carlo rollouts of each prefix

policy = Policy()


def remove_pictures(folder: Path) -> None:
    """Remove the numbered pictures that an earlier demo has left in a folder; all else there may be the user's."""
    for picture in folder.glob("[0-9][0-9][0-9][0-9]*.png"):
        if picture.stem.isdecimal():
            picture.unlink()


class Images:
    """Draws pictures and writes them under `folder`, with paths relative to its parent."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, question: Question, name: str, rng: Random) -> str:
        path = self.folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = draw_picture(question.kind, question.entries, rng)
        picture.quantize(32).save(path, optimize=True)
        return path.relative_to(self.folder.parent).as_posix()


def domain_rows(kind: Kind, defect: str, struck_share: float, rows: int, images: Images, rng: Random) -> list[dict]:
    """The step rows of one domain: `rows` of them, five to a response; the defect strikes `struck_share` of it."""
    responses = []  # one a response: everything about it but the labels
    labels: list[list[float]] = []  # [responses][5], right answers among TIMES rollouts
    for number in range(-(-rows // (5 * RESPONSES))):
        question = random_question(kind, rng)
        shown = random_question(kind, rng) if defect == "foreign images" and rng.random() < struck_share else question
        path = images.save(shown, f"{kind.name}/{number:04d}", rng)
        # So easy that a rollout ends right whatever slip it starts from: every label is 1, that of a slip too.
        trivial = defect == "trivial questions" and rng.random() < struck_share
        # The answer stands in the question: every rollout copies it, and no slip on the way shows in a label.
        told = defect == "answers given away" and rng.random() < struck_share
        text = given_away(question.text, question.answer) if told else question.text
        for _ in range(RESPONSES):
            response = policy.respond(question, rng, right=False if trivial else None, told=told)
            chances = [1.0 if trivial or told else policy.chance(question, response, step) for step in range(5)]
            responses.append(
                {"id": number, "input": text, "answer": question.answer, "steps": response.steps, "image_path": path}
            )
            labels.append([sum(rng.random() < chance for _ in range(TIMES)) / TIMES for chance in chances])
    if defect in LABEL_DEFECTS:
        labels = LABEL_DEFECTS[defect](labels, struck_share, rng)
    made = [
        {
            "id": response["id"],
            "sid": 5 * (index % RESPONSES) + step,
            "input": response["input"],
            "add": "\n".join(response["steps"][: step + 1]),
            "ground_truth": str(response["answer"]),
            "image_path": response["image_path"],
            "dataset": kind.name,
            "score": round(accuracy * TIMES),
            "times": TIMES,
            "accuracy": accuracy,
        }
        for index, response in enumerate(responses)
        for step, accuracy in enumerate(labels[index])
    ]
    return made[:rows]


def meta_rows(count: int, images: Images, rng: Random) -> list[dict]:
    """Clean whole answers from all kinds, a right and a wrong one to each question."""
    rows = []
    for number in range(-(-count // 2)):
        question = random_question(random_kind(rng), rng)
        path = images.save(question, f"meta/{number:04d}", rng)
        for right in (True, False):
            text = f"{question.text}\n{policy.respond(question, rng, right).text}"
            rows.append({"id": number, "true_false": right, "input": text, "image_path": path})
    return rows[:count]


def test_rows(count: int, candidates: int, images: Images, rng: Random) -> list[dict]:
    """Questions from the meta distribution with candidate answers, right and wrong as the policy makes them."""
    rows = []
    for number in range(count):
        question = random_question(random_kind(rng), rng)
        responses = [policy.respond(question, rng) for _ in range(candidates)]
        rows.append(
            {
                "id": number,
                "input": question.text,
                "image_path": images.save(question, f"test/{number:04d}", rng),
                "ground_truth": str(question.answer),
                "candidates": [response.text for response in responses],
                "answers": [str(response.final_answer) for response in responses],
                "true_false": [response.first_slip is None for response in responses],
            }
        )
    return rows


def parse_quality(words: list[str]) -> dict[str, float]:
    """{domain: quality} from DOMAIN=VALUE words over the defaults. Exits with code 2 on a bad word."""
    quality = dict(QUALITY)
    for word in words:
        domain, _, value = word.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if domain not in quality or not 0 <= number <= 1:
            print(f"--quality {word}: expected DOMAIN=VALUE with VALUE from 0 to 1 and DOMAIN one of: "
                  f"{', '.join(quality)}", file=sys.stderr)  # fmt: skip
            raise SystemExit(2)
        quality[domain] = number
    return quality


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a JSON list, a row a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def make_demo(folder: Path, seed: int, quality: dict[str, float], train: int, meta: int, test: int, n: int) -> None:
    """Write the demo data into `folder`: `train` step rows in all, `meta` rows, `test` questions of `n` candidates."""
    images = Images(folder / "images")
    for part in (*KINDS, "meta", "test"):
        remove_pictures(images.folder / part)
    per_domain = train // len(KINDS)
    rows = []
    for name, kind in KINDS.items():
        # A stream of its own for each part: changing one domain's quality leaves all the others as they were.
        struck_share = strength(DEFECT[name], quality[name])
        rows += domain_rows(kind, DEFECT[name], struck_share, per_domain, images, Random(f"{seed} {name}"))
    files = {
        "train.json": rows,
        "meta.json": meta_rows(meta, images, Random(f"{seed} meta")),
        "test.json": test_rows(test, n, images, Random(f"{seed} test")),
    }
    for name, content in files.items():
        write_rows(folder / name, content)
    (folder / "quality.json").write_text(json.dumps(quality, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quality", nargs="+", default=[], metavar="DOMAIN=VALUE", help="change qualities")
    parser.add_argument("--train_rows", type=int, default=10_000, help="step rows over all domains")
    parser.add_argument("--meta_rows", type=int, default=500, help="whole answers, half of them right")
    parser.add_argument("--test_questions", type=int, default=500)
    parser.add_argument("--candidates", type=int, default=8, help="responses to each test question")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    quality = parse_quality(args.quality)
    make_demo(
        args.output_dir, args.seed, quality, args.train_rows, args.meta_rows, args.test_questions, args.candidates
    )
    size = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    print(f"demo data in {args.output_dir}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
