"""What spoils a domain: five defects, each graded from quality 1 (none) to 0 (no signal left, or misleading).

Each domain has one defect. `STRENGTH` turns a quality into the defect's strength, the share of questions (or of
labels) that it strikes, so that equal qualities do about equal harm: calibrated by the AUC of a PRM trained on one
domain alone (`benchmarks/calibrate_quality.py`).
"""

from collections.abc import Callable
from random import Random


def noisy_labels(labels: list[list[float]], strength: float, rng: Random) -> list[list[float]]:
    """Replace a share of the answers' accuracies by those of other answers of the domain (careless rollouts)."""
    return [list(rng.choice(labels)) if rng.random() < strength else own for own in labels]


def flipped_labels(labels: list[list[float]], strength: float, rng: Random) -> list[list[float]]:
    """Turn the accuracies of a share of the answers upside down (a judge that mistakes right for wrong)."""
    return [[1 - a for a in own] if rng.random() < strength else own for own in labels]


LABEL_DEFECTS: dict[str, Callable[[list[list[float]], float, Random], list[list[float]]]] = {
    "noisy labels": noisy_labels,
    "flipped labels": flipped_labels,
}
DEFECTS = (*LABEL_DEFECTS, "foreign images", "trivial questions", "answers given away")

# The strength of each defect at quality 0, 0.25, 0.5, 0.75 and 1; between these by straight lines. Read off
# `benchmarks/results/calibrate_quality.json`: clean, the AUC of whole answers is 0.90; at quality 0.5 it is 0.80, at
# 0.25 it is 0.75 (to 0.02). At 0.75 a defect has half the strength of 0.5: between there and clean the AUC is too flat
# to read anything off. At 0 each defect strikes everything: nothing is left to learn (AUC 0.67 to 0.73, where the
# pretrained backbone stands without training), but labels that are all flipped teach the opposite (0.12).
QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
STRENGTH = {
    "noisy labels": (1.0, 0.68, 0.51, 0.255, 0.0),
    "flipped labels": (1.0, 0.3, 0.26, 0.13, 0.0),
    "foreign images": (1.0, 0.83, 0.59, 0.295, 0.0),
    "trivial questions": (1.0, 0.53, 0.46, 0.23, 0.0),
    "answers given away": (1.0, 0.57, 0.47, 0.235, 0.0),
}


def strength(defect: str, quality: float) -> float:
    """The share of a domain that its defect strikes at this quality, from 0 to 1."""
    table = STRENGTH[defect]
    place = min(int(quality * 4), 3)
    return table[place] + (quality - QUALITIES[place]) * 4 * (table[place + 1] - table[place])
