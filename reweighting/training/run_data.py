"""What a run reads: its JSON files, checked row by row, as chains."""

import gc
import sys
from dataclasses import dataclass

from reweighting.config.training import TrainingConfig
from reweighting.data.answers import candidate_correctness
from reweighting.data.chains import Chain, meta_chains, training_chains
from reweighting.data.load_rows import iterate_training_rows, load_candidate_rows, load_meta_rows
from reweighting.data.schema import CandidateRow
from reweighting.errors import UserError


@dataclass(frozen=True)
class RunData:
    """train: the training chains; domains: their K names, in the order of the weights. meta: the meta chains, empty
    where no weights are learned. validation: candidate rows, or none; right: whether each of their candidates is."""

    train: list[Chain]
    domains: list[str]
    meta: list[Chain]
    validation: list[CandidateRow]
    right: list[list[bool]]

    @property
    def rows(self) -> int:
        """How many training rows there are."""
        return sum(len(chain.rows) for chain in self.train)


def read_run_data(config: TrainingConfig) -> RunData:
    """Read the files that the flags name. Raises UserError, naming each wrong row, for what the user can mend."""
    gc.disable()  # it would go through millions of rows again and again, and find nothing
    try:
        return _read(config)
    finally:
        gc.enable()


def _read(config: TrainingConfig) -> RunData:
    learns = config.learns_weights
    rows = iterate_training_rows(config.data.train_json_file, config.data.image_root, min_domains=2 if learns else 1)
    train, domains = training_chains(rows, config.data.train_json_file)
    meta = []
    if learns:
        meta_rows = load_meta_rows(config.data.meta_json_file, config.data.image_root)
        meta, stepless = meta_chains(meta_rows, config.data.meta_json_file)
        if stepless:
            print(
                f"warning: {config.data.meta_json_file}: {stepless} of {len(meta_rows)} rows have no `Step N` marker "
                "and are left out",
                file=sys.stderr,
            )
    validation = []
    if config.data.validation_json_file is not None:
        validation = load_candidate_rows(config.data.validation_json_file, config.data.image_root)
    right = []
    for row in validation:
        known = candidate_correctness(row)
        if known is None:
            raise UserError(
                f"--validation_json_file {config.data.validation_json_file}: row {row.index}: needs true_false or "
                "ground_truth, to tell correct candidates from incorrect ones"
            )
        right.append(known)
    return RunData(train, domains, meta, validation, right)
