"""How near each method for the hypergradient is to exact autograd, and what directional derivatives cost.

    python benchmarks/hypergradient_accuracy.py        # two minutes

First on a small network in float64 (the one of `tests/bilevel/unrolling.py`), 2 micro-batches a step, five seeds. Then
on the embedded backbone, one thread: the directional derivatives of 8 micro-batches of 8 chains along AdamW's direction
of a gradient, after a window of 20 steps, against the products of that direction with their gradients.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import ROOT, write_results

from reweighting.bilevel.hypergradients import make_hypergradient
from reweighting.bilevel.hypergradients.derivatives import RADIUS, central_differences, forward_mode
from reweighting.bilevel.hypergradients.directional import DirectionalHypergradient
from reweighting.bilevel.losses import loss_at_parameters
from reweighting.config.training import TrainingConfig
from reweighting.distributed.flat_vectors import flatten
from reweighting.main import build_engine
from reweighting.training.resume import run_settings
from reweighting.training.run_data import read_run_data
from tests.bilevel.unrolling import Case, cosine_and_ratio

DERIVATIVES = {"jvp": forward_mode, "finite_difference": central_differences}
CASES = [("sgd", 0.0, 10, 5), ("sgd", 0.9, 10, 5), ("adamw", 0.0, 5, 5), ("adamw", 0.0, 20, 5), ("adamw", 0.0, 100, 5),
         ("adamw", 0.0, 20, 20), ("adamw", 0.0, 100, 20), ("adamw", 0.0, 1000, 20)]  # fmt: skip
SEEDS = range(5)


def make(method: str, case: Case):
    """Make a method for the small network."""
    if method in DERIVATIVES:
        return DirectionalHypergradient(case.optimizer, case.params, case.loss, DERIVATIVES[method])
    return make_hypergradient(method, case.model, case.optimizer)


def accuracies() -> list[dict]:
    """For each optimizer, steps before the window, steps in it and method: the least cosine and the range of ratios."""
    table = []
    for kind, momentum, before, count in CASES:
        row = {"optimizer": kind, "momentum": momentum, "steps_before": before, "steps": count}
        for method in ("unrolled", *DERIVATIVES):
            found = []
            for seed in SEEDS:
                case = Case(kind, momentum, before, count, seed=seed)
                hypergradient = make(method, case)
                exact, v = case.window(hypergradient)
                found.append(cosine_and_ratio(exact, hypergradient.compute(v, case.weights)))
            cosines, ratios = zip(*found, strict=True)
            row[method] = {"least_cosine": min(cosines), "least_ratio": min(ratios), "largest_ratio": max(ratios)}
        table.append(row)
        print(row, flush=True)
    return table


def derivatives_on_the_backbone() -> dict:
    """Relative errors of directional derivatives, and seconds for 8 micro-batches, by method and precision."""
    torch.set_num_threads(1)
    data, result = ROOT / "data", {}
    with TemporaryDirectory() as folder:
        config = TrainingConfig.parse(["--train_json_file", str(data / "train.json"), "--meta_json_file",
                                        str(data / "meta.json"), "--weights_path", folder, "--iteration_num", "20",
                                        "--hypergradient", "jvp", "--device", "cpu"])  # fmt: skip
        engine = build_engine(config, run_settings(config), read_run_data(config), Path(folder))
        engine.save = lambda **_: None
        engine.run()
    lower, params = engine.lower, engine.lower.named_trainable_parameters()
    loss = loss_at_parameters(lower.module, "fp32")
    batches = [lower.fetch_batch(number)[1] for number in range(100, 108)]
    direction = lower.hypergradient.direction(gradient(loss, params, lower.fetch_batch(200)[1]))
    direction /= direction.norm()
    started = time.perf_counter()
    exact = torch.stack([gradient(loss, params, batch) @ direction for batch in batches])
    result["forward_and_backward_seconds"] = time.perf_counter() - started
    for precision in ("fp32", "bf16"):
        loss = loss_at_parameters(lower.module, precision)
        for name, derivative in DERIVATIVES.items():
            more = {"radius": RADIUS[precision]} if derivative is central_differences else {}
            started = time.perf_counter()
            found = derivative(loss, params, batches, direction, **more)
            seconds = time.perf_counter() - started
            error = ((found - exact).norm() / exact.norm()).item()
            result[f"{name}, {precision}"] = {"error": error, "seconds": seconds}
    return result


def gradient(loss, params: dict, batch) -> torch.Tensor:
    """Of a batch's unweighted loss, [P]."""
    pieces = torch.autograd.grad(loss(params, batch), list(params.values()), allow_unused=True, materialize_grads=True)
    return flatten(pieces)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table, derivatives = accuracies(), derivatives_on_the_backbone()
    print(json.dumps(derivatives, indent=1))
    result = {"seeds": len(SEEDS), "small_network": table, "backbone": derivatives}
    print(write_results("hypergradient_accuracy", result))


if __name__ == "__main__":
    main()
