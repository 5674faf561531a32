"""How near each method for the hypergradient is to exact autograd, and what directional derivatives cost.

    python benchmarks/hypergradient_accuracy.py        # two minutes

First on a small network in float64 (the one of `tests/bilevel/unrolling.py`), 2 micro-batches a step, five seeds. Then
on the embedded backbone, one thread: the directional derivatives of 8 micro-batches of 8 chains along AdamW's direction
of a gradient, after a window of 20 steps, against the products of that direction with the gradients of the chains.
"""

import argparse
import json
import time
from collections.abc import Iterator
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
    """Errors of the directional derivatives of 64 chains, and processor seconds, by method and precision."""
    torch.set_num_threads(1)
    data, result = ROOT / "data", {}
    with TemporaryDirectory() as folder:
        config = TrainingConfig.parse(["--train_json_file", str(data / "train.json"), "--meta_json_file",
                                        str(data / "meta.json"), "--weights_path", folder, "--iteration_num", "20",
                                        "--hypergradient", "unrolled", "--device", "cpu"])  # fmt: skip
        engine = build_engine(config, run_settings(config), read_run_data(config), Path(folder))
        engine.save = lambda **_: None
        engine.run()
    lower, params = engine.lower, engine.lower.named_trainable_parameters()
    loss = loss_at_parameters(lower.module, "fp32")
    batches = [lower.fetch_batch(number)[1] for number in range(100, 108)]
    hypergradient = DirectionalHypergradient(lower.optimizer, params, loss, forward_mode)
    (gradient,) = gradients(loss(params, lower.fetch_batch(200)[1]).sum()[None], params)
    direction = hypergradient.direction(gradient)
    direction /= direction.norm()
    started = time.process_time()
    for batch in batches:
        list(gradients(loss(params, batch).sum()[None], params))
    result["forward_and_backward_seconds"] = time.process_time() - started
    exact = torch.tensor(
        [gradient @ direction for batch in batches for gradient in gradients(loss(params, batch), params)]
    )
    for precision in ("fp32", "bf16"):
        loss = loss_at_parameters(lower.module, precision)
        for name, derivative in DERIVATIVES.items():
            more = {"radius": RADIUS[precision]} if derivative is central_differences else {}
            started = time.process_time()
            found = torch.cat(derivative(loss, params, batches, direction, **more))  # [64]
            seconds = time.process_time() - started
            error = ((found - exact).norm() / exact.norm()).item()
            cosine = torch.cosine_similarity(found, exact, dim=0).item()
            result[f"{name}, {precision}"] = {"error": error, "cosine": cosine, "seconds": seconds}
    return result


def gradients(values: torch.Tensor, params: dict) -> Iterator[torch.Tensor]:
    """Of each of several values [n] that share a graph, [P]."""
    for value in values:
        pieces = torch.autograd.grad(
            value, list(params.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        yield flatten(pieces)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table, derivatives = accuracies(), derivatives_on_the_backbone()
    print(json.dumps(derivatives, indent=1))
    result = {"seeds": len(SEEDS), "small_network": table, "backbone": derivatives}
    print(write_results("hypergradient_accuracy", result))


if __name__ == "__main__":
    main()
