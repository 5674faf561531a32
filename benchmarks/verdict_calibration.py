"""How often a verdict is chance, and how far the calm rule moves weights by chance, in made series without any effect.

    python benchmarks/verdict_calibration.py        # a minute

Series of ten domains: windows that are correlated with their neighbours, of several lengths; and windows that each hold
a part of a finite meta set, whose answers pull the domains each its own way, passed over several times. `naive` is the
share of verdicts if every window counted as new evidence.
"""

import argparse
import math

import numpy as np
import torch
from common import write_results

from reweighting.bilevel.calm_weights import CalmWeights
from reweighting.bilevel.domain_weights import DomainWeights
from reweighting.bilevel.evidence import SlopeEvidence

DOMAINS, ANSWERS = 10, 16  # answers in a window


def correlated(rng: np.random.Generator, windows: int, rho: float) -> np.ndarray:
    """Hypergradients [windows, DOMAINS] of an autoregression of order 1."""
    series = [rng.normal(size=DOMAINS)]
    for _ in range(windows - 1):
        series.append(rho * series[-1] + math.sqrt(1 - rho**2) * rng.normal(size=DOMAINS))
    return np.stack(series)


def repeated(rng: np.random.Generator, windows_per_pass: int, passes: int) -> np.ndarray:
    """Hypergradients [windows, DOMAINS] of windows that share out a meta set, anew in each pass."""
    answers = rng.normal(size=(windows_per_pass * ANSWERS, DOMAINS))
    order = np.concatenate([rng.permutation(len(answers)) for _ in range(passes)])
    return answers[order].reshape(-1, ANSWERS, DOMAINS).mean(1)


def share_of_verdicts(series: np.ndarray, windows_per_pass: float) -> tuple[float, float]:
    """The share of domains with a verdict, and the standard deviation of the calm weights."""
    table, evidence = DomainWeights([str(i) for i in range(DOMAINS)]), SlopeEvidence(DOMAINS, windows_per_pass)
    for window in series:
        evidence.add(torch.tensor(window))
    CalmWeights(table, evidence, 3.0).step()
    found = np.mean([verdict != "cannot be told" for verdict in evidence.slopes().verdicts])
    return float(found), table().std().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=200, help="series of each kind")
    args = parser.parse_args()
    result: dict[str, list[dict]] = {"correlated": [], "repeated": []}
    for windows in (6, 12, 30, 120):
        for rho in (0.0, 0.3, 0.5, 0.7):
            rng = np.random.default_rng(7)
            made = [correlated(rng, windows, rho) for _ in range(args.series)]
            shares, spreads = zip(*(share_of_verdicts(one, math.inf) for one in made), strict=True)
            row = {
                "windows": windows,
                "rho": rho,
                "false_verdicts": float(np.mean(shares)),
                "calm_sd": float(np.mean(spreads)),
            }
            result["correlated"].append(row)
            print(row, flush=True)
    for windows_per_pass in (2, 4, 8):
        for passes in (1, 4, 12):
            rng = np.random.default_rng(7)
            made = [repeated(rng, windows_per_pass, passes) for _ in range(args.series)]
            shares, spreads = zip(*(share_of_verdicts(one, windows_per_pass) for one in made), strict=True)
            naive = np.mean([share_of_verdicts(one, math.inf)[0] for one in made])
            row = {"windows_per_pass": windows_per_pass, "passes": passes, "false_verdicts": float(np.mean(shares)),
                   "naive": float(naive), "calm_sd": float(np.mean(spreads))}  # fmt: skip
            result["repeated"].append(row)
            print(row, flush=True)
    print(write_results("verdict_calibration", {"series": args.series, "seed": 7, **result}))


if __name__ == "__main__":
    main()
