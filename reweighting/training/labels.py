"""The labels that a run corrects: made from the flags, and saved.

corrected_labels.parquet   a row for each labelled step of the training chains
"""

import math
from pathlib import Path

import torch

from reweighting.bilevel.label_correction import LabelCorrection, StepLabels
from reweighting.config.training import TrainingConfig, UpperConfig
from reweighting.errors import UserError
from reweighting.files import atomic_file
from reweighting.terminal import printable
from reweighting.training.instance_results import chain_digest
from reweighting.training.run_data import RunData

FILE = "corrected_labels.parquet"


def make_step_labels(config: TrainingConfig, data: RunData) -> StepLabels | None:
    """Make the labels that the upper level moves, as the data have them; None where they stay so.

    Raises:
        UserError: --correct_labels interval needs the rollouts behind a label, and they are not known; or no label may
            move.
    """
    bounds = config.upper.correct_labels
    if not config.corrects_labels or bounds is None:
        return None
    table = StepLabels(data.train, bounds, config.upper.label_times)
    labelled = sum(chain.num_labeled_steps for chain in data.train)
    if unknown := len(table.unknown):
        chain = data.train[int(torch.searchsorted(table.first, table.unknown[0], right=True)) - 1]
        raise UserError(
            f"--correct_labels interval: {unknown} of {labelled} labels do not say of how many rollouts they are the "
            f"mean, which bounds how far they may move, first in {chain.source_location}: give `times` beside them, or "
            "their number with --label_times (labels of people are no means of rollouts: use --correct_labels "
            "published, or none)"
        )
    if not table.movable:
        raise UserError(
            f"--correct_labels {bounds}: none of the {labelled} labels can move, since each is the last of its answer, "
            "0 or 1: whether the answer is correct. Leave the flag out, or give rows that label the steps before it"
        )
    return table


def make_label_correction(config: UpperConfig, table: StepLabels) -> LabelCorrection:
    """Make the rule by which the labels move: AdamW, or with --meta_optimizer calm by the evidence of all windows."""
    if config.meta_optimizer == "calm":
        return LabelCorrection(table, None)
    # The gradients are as small as --lr: see `build.make_meta_optimizer`.
    return LabelCorrection(table, torch.optim.AdamW(table.parameters(), lr=config.label_lr, weight_decay=0, eps=1e-15))


@torch.no_grad()
def save_corrected_labels(folder: Path, data: RunData, correction: LabelCorrection) -> None:
    """Write `corrected_labels.parquet`, and print how far the labels have moved.

    Args:
        folder: the output folder.
        data: the chains.
        correction: has moved their labels.

    Raises:
        UserError: if the disk refuses.
    """
    import pyarrow  # half a second that other runs need not wait for
    import pyarrow.parquet

    table, evidence = correction.table.cpu(), correction.evidence
    steps = [
        (chain, number, chain.rows[place] if len(chain.rows) == chain.num_labeled_steps else chain.rows[0])
        for chain in data.train
        for place, number in enumerate(n for n, target in enumerate(chain.targets) if not math.isnan(target))
    ]
    places = [place for place, target in enumerate(t for c in data.train for t in c.targets) if not math.isnan(target)]
    start, labels, low, high = (x[places] for x in (table.start, table.labels, table.low, table.high))
    slopes = evidence.mean
    digests = {id(chain): chain_digest(chain, data.domains) for chain in data.train}
    columns = {
        "chain": [digests[id(chain)] for chain, *_ in steps],
        "source": [chain.source for chain, *_ in steps],
        "row": [row for *_, row in steps],
        "domain": [data.domains[chain.domain] for chain, *_ in steps],
        "step": [number for _, number, _ in steps],
        "label": start.tolist(),
        "corrected_label": labels.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "times": [None if math.isnan(times) else times for times in table.times[places].tolist()],
        "windows": evidence.count[places].long().tolist(),
        "slope": slopes[places].tolist(),
    }
    with atomic_file(folder / FILE) as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    moved = (labels - start).abs()
    at_end = ((labels == low) | (labels == high)) & (moved > 0)
    print(printable(
        f"\ncorrected labels in {folder / FILE}: {int((moved > 0).sum())} of {len(places)} have moved, by "
        f"{moved.mean():.3f} on average over all; {int(at_end.sum())} are at an end of their bounds"
    ))  # fmt: skip
    if correction.optimizer is None and not evidence.true_slopes().any():
        print("No label moves yet: chance may explain the differences between their slopes. A longer run tells more")
