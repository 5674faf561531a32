"""How fast best_of_n.py scores, against one forward pass for each prefix of each candidate.

    python benchmarks/best_of_n_throughput.py --weights_path weights       # a trained model, or any other

The ways take turns on the same questions of the demo's test set, so that other load on the machine slows all alike.
`best_of_n`: one pass a chain, in batches, a question's candidates sharing its image features. `per prefix`: one pass
for each step, alone, with everything up to it. `per prefix, batched`: the same passes in batches of the same size.
Images and text are read anew each time.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import ROOT, ProcessRewardModel, load_candidate_rows, score_candidates, write_results

from reweighting.data.chains import candidate_chains
from reweighting.inference.scorer import model_folder


def best_of_n(model: ProcessRewardModel, rows: list, batch_size: int) -> torch.Tensor:
    """The logits of all steps of all candidates, one after the other."""
    return torch.cat([z[mask] for z, mask in score_candidates(model, rows, batch_size)])


def per_prefix(model: ProcessRewardModel, rows: list, batch_size: int) -> torch.Tensor:
    """The same logits, each from a pass of its own."""
    chains = [chain for row in rows for chain in candidate_chains(row)]
    prefixes = [replace(c, steps=c.steps[: n + 1]) for c in chains for n in range(len(c.steps))]
    if batch_size == 1:  # one at a time, and nothing shared, not even the image's features
        encode_image, model.chain_tokenizer.encode_image = model.chain_tokenizer.encode_image, None
        parts = [model.chain_logits([prefix]) for prefix in prefixes]
        model.chain_tokenizer.encode_image = encode_image
    else:
        parts = [model.chain_logits(prefixes, batch_size)]
    return torch.cat([z.gather(1, mask.sum(1, keepdim=True) - 1).flatten() for z, mask in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights_path", default=str(ROOT / "weights"), help="folder of a run, or its prm/")
    parser.add_argument("--candidates_json_file", type=Path, default=ROOT / "data" / "test.json")
    parser.add_argument("--questions", type=int, default=32, help="in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    model = ProcessRewardModel.from_pretrained(model_folder(args.weights_path))
    rows = load_candidate_rows(args.candidates_json_file)
    ways = {
        "best_of_n": lambda part: best_of_n(model, part, args.batch_size),
        "per prefix": lambda part: per_prefix(model, part, 1),
        "per prefix, batched": lambda part: per_prefix(model, part, args.batch_size),
    }
    for way in ways.values():
        way(rows[:2])  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    largest = 0.0
    for turn in range(args.turns):
        part = [rows[(turn * args.questions + i) % len(rows)] for i in range(args.questions)]
        found = {}
        for name, way in ways.items():
            started = time.perf_counter()
            found[name] = way(part)
            seconds[name].append(time.perf_counter() - started)
        steps = len(found["best_of_n"])
        largest = max(largest, *((z - found["best_of_n"]).abs().max().item() for z in found.values()))
        print(f"turn {turn + 1}: {steps} steps, " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()))
    ratios = {
        name: [slow / fast for slow, fast in zip(seconds[name], seconds["best_of_n"], strict=True)] for name in ways
    }
    content = {
        "threads": torch.get_num_threads(),
        "questions_in_a_turn": args.questions,
        "candidates_a_question": len(rows[0].candidates),
        "batch_size": args.batch_size,
        "seconds": seconds,
        "times_slower_than_best_of_n": {name: statistics.median(values) for name, values in ratios.items()},
        "largest_difference_of_a_logit": largest,
    }
    print({name: round(value, 2) for name, value in content["times_slower_than_best_of_n"].items()}, largest)
    print(write_results("best_of_n_throughput", content))


if __name__ == "__main__":
    main()
