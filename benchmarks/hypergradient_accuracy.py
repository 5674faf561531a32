"""How near each way to the hypergradient is to exact autograd through the unrolled optimizer, and what slopes cost.

    python benchmarks/hypergradient_accuracy.py        # two minutes

First on a small network in float64 (the one of `tests/bilevel/test_directional.py`), 2 micro-batches a step,
five seeds. Then on the embedded backbone, one thread:
the slopes of 8 micro-batches of 8 chains along AdamW's direction of a gradient, after a
window of 20 steps, against the products of that direction with their gradients.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import ROOT, write_results
from tests.test_replay import compared

from reweighting.bilevel.hypergradients.directional import RADIUS, central_differences, forward_mode
from reweighting.config.training import parse_training_config
from reweighting.distributed.flat_vectors import flatten
from reweighting.main import build_engine
from reweighting.training.resume import run_settings
from reweighting.training.run_data import read_run_data

TRAIN_MODES = {"unrolled": None, "jvp": forward_mode, "finite_difference": central_differences}
CASES = [("sgd", 0.0, 10, 5), ("sgd", 0.9, 10, 5), ("adamw", 0.0, 5, 5), ("adamw", 0.0, 20, 5), ("adamw", 0.0, 100, 5),
         ("adamw", 0.0, 20, 20), ("adamw", 0.0, 100, 20), ("adamw", 0.0, 1000, 20)]  # fmt: skip
SEEDS = range(5)


def accuracies() -> list[dict]:
    """For each optimizer, steps before the window, steps in it and way: the least cosine and the range of ratios."""
    table = []
    for kind, momentum, before, count in CASES:
        row = {"optimizer": kind, "momentum": momentum, "steps_before": before, "steps": count}
        for way, slopes in TRAIN_MODES.items():
            found = [compared(kind, momentum, before, 2, 0.0, slopes, count, seed) for seed in SEEDS]
            cosines, ratios = zip(*found, strict=True)
            row[way] = {"least_cosine": min(cosines), "least_ratio": min(ratios), "largest_ratio": max(ratios)}
        table.append(row)
        print(row, flush=True)
    return table


def slopes_on_the_backbone() -> dict:
    """Relative errors of slopes, and seconds for 8 micro-batches, by way and precision."""
    torch.set_num_threads(1)
    data, result = ROOT / "data", {}
    with TemporaryDirectory() as folder:
        config = parse_training_config(["--train_json_file", str(data / "train.json"), "--meta_json_file",
                                str(data / "meta.json"), "--weights_path", folder, "--iteration_num", "20",
                                "--hypergradient", "jvp", "--device", "cpu"])  # fmt: skip
        engine = build_engine(config, run_settings(config), read_run_data(config), Path(folder))
        engine.save = lambda **_: None
        engine.run()
    lower, params = engine.lower, engine.lower.named_trainables()
    batches = [lower.draw(number)[1] for number in range(100, 108)]
    direction = lower.window.direction(gradient(lower, params, lower.draw(200)[1]))
    direction /= direction.norm()
    started = time.perf_counter()
    exact = torch.stack([gradient(lower, params, batch) @ direction for batch in batches])
    result["forward_and_backward_seconds"] = time.perf_counter() - started
    for precision in ("fp32", "bf16"):
        lower.precision = precision
        for way in (forward_mode, central_differences):
            more = {"radius": RADIUS[precision]} if way is central_differences else {}
            started = time.perf_counter()
            found = way(lower.loss_at, params, batches, direction, **more)
            seconds = time.perf_counter() - started
            error = ((found - exact).norm() / exact.norm()).item()
            result[f"{way.__name__}, {precision}"] = {"error": error, "seconds": seconds}
    return result


def gradient(lower, params: dict, batch) -> torch.Tensor:
    """Of a batch's unweighted loss, [P]."""
    loss = lower.loss_at(params, batch)
    return flatten(torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table, slopes = accuracies(), slopes_on_the_backbone()
    print(json.dumps(slopes, indent=1))
    print(write_results("hypergradient_accuracy", {"seeds": len(SEEDS), "small_network": table, "backbone": slopes}))


if __name__ == "__main__":
    main()
