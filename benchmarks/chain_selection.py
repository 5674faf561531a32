"""Which chains to train on: baselines that leave chains out, where domain weights would weigh them all.

A chain is a dict with `dataset` and `labels` (one a step, None where it has none), and whatever else its owner needs.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
BIS_ALPHA = 0.05  # the paper's smoothing constant


def by_domain(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """{domain: its rows}."""
    members = defaultdict(list)
    for row in rows:
        members[row["dataset"]].append(row)
    return dict(sorted(members.items()))


def balanced_information(labels: Iterable[float | None]) -> float:
    """The balanced-information score of a chain (BIS, arXiv 2602.04145): label mixture times reliability.

    It is (p (1 - p) + alpha) R: p the share of steps with a label above 0, R the mean label of these, 1 if there are
    none.
    """
    known = [label for label in labels if label is not None]
    positive = [label for label in known if label > 0]
    share = len(positive) / len(known)
    return (share * (1 - share) + BIS_ALPHA) * (sum(positive) / len(positive) if positive else 1.0)


def first_share(chains: Sequence[Row], share: float, key: Callable[[Row], float]) -> list[Row]:
    """The first chains in the order of a key, a share of them, rounded up."""
    return sorted(chains, key=key)[: math.ceil(share * len(chains))]


def share_of_each_domain(chains: Iterable[Row], share: float, key: Callable[[Row], float]) -> list[Row]:
    """The first chains of each domain in the order of a key, the same share of every domain."""
    return [chain for own in by_domain(chains).values() for chain in first_share(own, share, key)]
