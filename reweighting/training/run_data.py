"""What a run reads: its files, checked row by row, as chains."""

import gc
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from reweighting.config.training import TrainingConfig
from reweighting.data.answers import candidate_correctness, stated_answers
from reweighting.data.chains import Chain, candidate_chains, step_warnings
from reweighting.data.load_answers import LoadReport
from reweighting.data.load_chains import Chains, iterate_candidates, load_meta, load_training, shared_questions
from reweighting.data.row_files import short_repr
from reweighting.data.schema import CandidateRow
from reweighting.errors import UserError
from reweighting.terminal import printable


@dataclass(frozen=True)
class RunData:
    """What the files hold.

    Attributes:
        train: the training chains.
        domains: their K names, in the order of the weights.
        meta: the meta chains; none where no weights are learned.
        validation: candidate rows of which it is known for at least one candidate whether it is correct, or none.
        correct: for each of those rows whether each candidate is correct; None if that is not known.
    """

    train: list[Chain]
    domains: list[str]
    meta: list[Chain]
    validation: list[CandidateRow]
    correct: list[list[bool | None]]

    @property
    def rows(self) -> int:
        """How many training rows there are."""
        return sum(len(chain.rows) for chain in self.train)


def read_run_data(config: TrainingConfig) -> RunData:
    """Read the files that the flags name, and warn of what is odd about them.

    Raises:
        UserError: naming each wrong row, or what a file lacks.
    """
    gc.disable()  # it would go through millions of rows again and again, and find nothing
    try:
        return _read(config)
    finally:
        gc.enable()


def _read(config: TrainingConfig) -> RunData:
    files, reading, root = config.data, config.reading, config.data.image_root
    options = reading.options()
    sources = reading.sources(files.train_json_file, files.mixture)
    min_domains = 2 if config.weighs_domains and not config.corrects_labels else 1
    train = load_training(sources, root, options, min_domains=min_domains)
    _check_batch_size(config.lower.batch_size, train.chains, train.domains)
    _warn(*train.notes)
    meta = Chains()
    if config.learns_weights:
        meta = load_meta(reading.sources(files.meta_json_file), root, options)
        _warn(*meta.notes)
        _warn_of_shared("meta", train.chains, meta.chains)
    validation, correct = [], []
    if files.validation_json_file is not None:
        validation, correct = _read_validation(config)
        chains = (chain for row in validation for chain in candidate_chains(row))
        _warn_of_shared("validation", train.chains, chains)
    return RunData(train.chains, train.domains, meta.chains, validation, correct)


def _warn_of_shared(use: str, train: list[Chain], others: Iterable[Chain]) -> None:
    """Warn of questions that are trained on and measured with."""
    shared = shared_questions(train, others)
    if shared:
        _warn(f"{shared} questions of the {use} data are training questions too: what is measured on them says little "
              "about others")  # fmt: skip


def _check_batch_size(batch_size: int, train: list[Chain], domains: list[str]) -> None:
    """Warn of domains with fewer chains than a batch. Raises UserError for a batch of more than all chains."""
    if batch_size > len(train):
        raise UserError(f"--batch_size {batch_size}: there are {len(train)} chains, and a batch holds those of one "
                        "domain: use a smaller one")  # fmt: skip
    counts = Counter(chain.domain for chain in train)
    small = [(count, domains[domain]) for domain, count in counts.items() if count < batch_size]
    if small:
        count, name = min(small)
        _warn(f"--batch_size {batch_size}: {len(small)} of {len(domains)} domains have fewer chains, so each of their "
              f"batches repeats some; the smallest, {short_repr(name)}, has {count}")  # fmt: skip


def _read_validation(config: TrainingConfig) -> tuple[list[CandidateRow], list[list[bool | None]]]:
    """The candidate rows that can tell a good checkpoint, and whether their candidates are correct, where known.

    Raises UserError if a row does not say what is correct, or no row's answers can be read.
    """
    sources, report = config.reading.sources(config.data.validation_json_file), LoadReport()
    path = " ".join(source.path for source in sources)
    rows = list(iterate_candidates(sources, config.data.image_root, config.reading.options(), report))
    _warn(*report.notes(), *step_warnings((chain for row in rows for chain in candidate_chains(row, path)), path))
    candidates = unstated = undecided = 0
    validation, correct = [], []
    for row in rows:
        known = candidate_correctness(row)
        if known is None:
            raise UserError(f"--validation_json_file {path}: row {row.index}: needs true_false or ground_truth, to "
                            "separate correct candidates from incorrect ones")  # fmt: skip
        candidates += len(known)
        answers = stated_answers(row) if None in known else known
        unstated += answers.count(None)
        undecided += known.count(None) - answers.count(None)
        if any(entry is not None for entry in known):
            validation.append(row)
            correct.append(known)
    counts = (
        f"{unstated} of {candidates} candidates state no answer, and for {undecided} it cannot be decided whether "
        "it equals ground_truth"
    )
    if not validation:
        raise UserError(
            f"--validation_json_file {path}: no checkpoint can be chosen by it: {counts}. Give `true_false`, or "
            "`answers` beside `ground_truth`, or let the candidates end in `Final answer: ...`"
        )
    if unstated or undecided:
        left_out = len(rows) - len(validation)
        _warn(f"--validation_json_file {path}: {counts}; they are not chosen from, and {left_out} questions that "
              "have no other candidates are left out")  # fmt: skip
    return validation, correct


def _warn(*messages: str) -> None:
    for message in messages:
        print(f"warning: {printable(message)}", file=sys.stderr)
