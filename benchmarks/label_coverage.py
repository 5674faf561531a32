"""Do labels of 16 rollouts scatter about the true chance as a binomial does?

    python benchmarks/label_coverage.py --prefixes 100                      # five minutes of one core
    python benchmarks/label_coverage.py --prefixes 2060 --parallel 2        # adds to them

The demo's policy continues beginnings of its answers in `data/rollouts/train.json` 512 times each. The first 16
continuations give the label and its 95 % confidence interval (Wilson, 1927), all others the true chance, up to 0.02.
Counted is how often the interval holds it. Writes `results/label_coverage.json`.
"""

import argparse
import asyncio
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from random import Random

import numpy as np
import torch
from common import ROOT, read_results, use_one_thread, write_results

from reweighting.bilevel.label_correction import wilson_interval
from reweighting.labeling.checker import compare
from reweighting.labeling.local_policy import LocalPolicy
from reweighting.labeling.policy import Sampling
from reweighting.labeling.questions import Question

DATA = ROOT / "data"
ROLLOUT_DEMO = DATA / "rollouts"
ROLLOUTS, LABEL, GROUP, MAX_TOKENS, SEED = 512, 16, 10, 120, 0


def beginnings() -> list[tuple[Question, str]]:
    """All beginnings of answers that end before the last step, with their questions, in random order."""
    found = []
    for number, row in enumerate(json.loads((ROLLOUT_DEMO / "train.json").read_text())):
        if "Final answer" not in row["add"]:
            key = f"{row['image_path']} {row['input']}"
            image = ROLLOUT_DEMO / row["image_path"]
            place = f"row {number}"
            question = Question(row["input"], (image,), row["ground_truth"], row["dataset"], None, place, key, key)
            found.append((question, row["add"]))
    Random(SEED).shuffle(found)
    return found


async def count_correct(policy: LocalPolicy, question: Question, prefix: str) -> list[int]:
    """How many of the first 16 continuations are correct, of how many that can be judged; the same of the others."""
    texts = await asyncio.gather(*(policy.complete(question, prefix, n) for n in range(ROLLOUTS)))
    verdicts = [compare(f"{prefix}{text}", question) for text in texts]
    label, others = ([one for one in part if one is not None] for part in (verdicts[:LABEL], verdicts[LABEL:]))
    return [sum(label), len(label), sum(others), len(others)]


def covered(counts: list[list[int]]) -> dict[str, float]:
    """The share of intervals that hold the chance, and the scatter of the labels against a binomial's."""
    judged = [row for row in counts if row[1] and row[3]]
    score, times, others, of = (torch.tensor(column, dtype=torch.float64) for column in zip(*judged, strict=True))
    label, chance = score / times, others / of
    low, high = wilson_interval(label, times)
    inside = ((low <= chance) & (chance <= high)).numpy()
    open_ = (chance > 0.05) & (chance < 0.95)
    expected = (chance * (1 - chance) * (1 / times + 1 / of))[open_].mean()
    return {
        "prefixes": len(judged),
        "coverage": float(inside.mean()),
        "open_prefixes": int(open_.sum()),
        "coverage_of_open": float(inside[open_.numpy()].mean()),
        "variance_over_binomial": float((label - chance)[open_].square().mean() / expected),
        "mean_chance": float(np.mean(chance.numpy())),
    }


async def count_group(group: list[tuple[Question, str]], concurrency: int) -> list[list[int]]:
    """Continue some beginnings together."""
    sampling = Sampling(1.0, MAX_TOKENS)
    policy = LocalPolicy(str(DATA / "policy"), "{question}", sampling, concurrency, seed=1, precision="fp32")
    async with policy:
        return await asyncio.gather(*(count_correct(policy, question, prefix) for question, prefix in group))


def count_in_process(concurrency: int, group: list[tuple[Question, str]]) -> list[list[int]]:
    """The same, in a process of its own."""
    use_one_thread()
    return asyncio.run(count_group(group, concurrency))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefixes", type=int, default=100)
    parser.add_argument("--parallel", type=int, default=1, help="processes")
    parser.add_argument("--concurrency", type=int, default=2048, help="texts at a time in each")
    args = parser.parse_args()
    counts = read_results("label_coverage").get("counts", [])
    left = beginnings()[len(counts) : args.prefixes]
    groups = [left[first : first + GROUP] for first in range(0, len(left), GROUP)]
    with ProcessPoolExecutor(args.parallel, get_context("spawn")) as pool:  # CUDA does not survive a fork
        for found in pool.map(partial(count_in_process, args.concurrency), groups):
            counts += found
            result = covered(counts)
            print(result, flush=True)
            write_results("label_coverage", {"rollouts": ROLLOUTS, "label": LABEL, **result, "counts": counts})


if __name__ == "__main__":
    main()
