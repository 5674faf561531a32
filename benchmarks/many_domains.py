"""Thirty domains, from 2 to 200 answers each, with meta sets of 50, 200 and 500: do the weights find anything?

    python benchmarks/many_domains.py --work /tmp/many_domains        # resumable: finished runs are not repeated

The domains are those of three demo worlds (21 to 23) whose qualities are dealt anew; the sizes, evenly spaced on a
logarithmic scale, are dealt among them by each seed. The meta answers are the first world's, half of them correct, and
so are the test questions. Runs of 600 steps with equal weights, and with learned ones for each size of the meta set.
Writes `results/many_domains.json`.
"""

import argparse
import json
from pathlib import Path
from random import Random

import numpy as np
from common import agreement, learned_weights, make_reassigned, use_one_thread, write_results
from demo_runs import evaluate, summary

WORLDS, STEPS, SMALLEST, LARGEST = (21, 22, 23), 5, 2, 200
RULES = {"equal": ("--baseline",), **{f"learned, {n} meta answers": () for n in (50, 200, 500)}}


def read(world: Path, name: str) -> list[dict]:
    """The rows of a file of a world, with absolute paths of their images."""
    rows = json.loads((world / f"{name}.json").read_text())
    return [row | {"image_path": str((world / row["image_path"]).resolve())} for row in rows]


def make_domains(work: Path, seed: int) -> tuple[Path, dict[str, float], dict[str, int]]:
    """The folder of a seed's data, and each domain's quality and number of answers."""
    folder, quality, rows = work / f"data-{seed}", {}, {}
    for number in WORLDS:
        world = work / f"world-{number}"
        quality |= {f"{name}-{number}": value for name, value in make_reassigned(world, number).items()}
        for row in read(world, "train"):
            name = f"{row['dataset']}-{number}"
            rows.setdefault(name, []).append(row | {"dataset": name, "id": f"{name}-{row['id']}"})
    rng = Random(seed)
    sizes = np.geomspace(SMALLEST, LARGEST, len(quality)).round().astype(int).tolist()
    rng.shuffle(sizes)
    size = dict(zip(quality, sizes, strict=True))
    if not (folder / "test.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        kept = [row for name in quality for row in rows[name][: STEPS * size[name]]]
        (folder / "train.json").write_text(json.dumps(kept))
        answers = read(work / f"world-{WORLDS[0]}", "meta")
        rng.shuffle(answers)
        for count in (50, 200, 500):
            halves = [[row for row in answers if row["true_false"] is kind][: count // 2] for kind in (True, False)]
            (folder / f"meta-{count}.json").write_text(json.dumps([row for half in halves for row in half]))
        (folder / "test.json").write_text(json.dumps(read(work / f"world-{WORLDS[0]}", "test")))
    return folder, quality, size


def one(work: Path, rule: str, seed: int) -> dict:
    """A run: its measures, its weights and how they rank the domains."""
    folder, quality, size = make_domains(work, seed)
    output, flags = work / f"{rule.replace(', ', '-').replace(' ', '-')}-{seed}", RULES[rule]
    if rule != "equal":
        flags = (*flags, "--meta_json_file", str(folder / f"meta-{rule.split()[1]}.json"))
    scores = evaluate(folder, output, seed, *flags)
    found = {"best_of_8": scores["best_of_8"], "auc": scores["auc"]["answers"]}
    if rule != "equal":
        weights = learned_weights(output)
        domains = json.loads((output / "domain_weights.json").read_text())["evidence"]["domains"]
        told = {name: entry["verdict"] for name, entry in domains.items() if entry["verdict"] != "cannot be told"}
        middle = float(np.median(list(quality.values())))
        found["verdicts"] = len(told)
        found["right_verdicts"] = sum((quality[name] > middle) == (told[name] == "helps") for name in told)
        moved = len(set(weights.values())) > 1
        found["spearman"] = agreement(weights, quality)["spearman"] if moved else None
        found |= {"weights": weights}
    return found | {"quality": quality, "answers": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/many_domains"), help="runs and made data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    use_one_thread()
    found: dict[str, dict] = {}
    for rule in RULES:
        runs = {seed: one(args.work, rule, seed) for seed in args.seeds}
        names = [
            name
            for name in ("best_of_8", "auc", "spearman", "verdicts", "right_verdicts")
            if name in runs[args.seeds[0]]
        ]
        told = {name: [run[name] for run in runs.values() if run[name] is not None] for name in names}
        found[rule] = {"means": {name: summary(values) for name, values in told.items() if values}, "runs": runs}
        print(rule, json.dumps(found[rule]["means"]), flush=True)
        write_results("many_domains", {"seeds": args.seeds, "rules": found})


if __name__ == "__main__":
    main()
