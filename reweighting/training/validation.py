"""Best-of-N accuracy on the candidates of `--validation_json_file`, by which the best checkpoint is chosen."""

import torch
from torch import Tensor

from reweighting.data.schema import CandidateRow
from reweighting.devices import autocast
from reweighting.distributed import collectives
from reweighting.errors import UnreadableImage, UserError
from reweighting.inference.candidates import best_of_n_accuracy, score_candidates
from reweighting.modeling.reward_model import ProcessRewardModel


class Validation:
    """Score candidates with the model as it is, all processes together.

    Args:
        model: the reward model in training.
        rows: the candidates.
        correct: for each row, whether each of its candidates is correct; None if that is not known.
        source: the rows' file, for messages.
        batch_size: candidates scored at a time.
        device: where the model computes.
        precision: "fp32" or "bf16".
    """

    def __init__(
        self,
        model: ProcessRewardModel,
        rows: list[CandidateRow],
        correct: list[list[bool | None]],
        source: str,
        batch_size: int,
        device: torch.device,
        precision: str,
    ):
        self.model, self.rows, self.correct, self.source, self.batch_size = model, rows, correct, source, batch_size
        self.device, self.precision = device, precision

    def score_share(self) -> list[tuple[Tensor, Tensor]]:
        """Score this process's part of the rows; a sharded model scores all rows on all processes.

        Raises:
            UnreadableImage: if an image cannot be read now, and this process may try again.
            UserError: if it may not, since the others wait inside a sharded model.
        """
        rows = collectives.local_slice(self.rows) if self.model.holds_full_parameters else self.rows
        try:
            with autocast(self.device, self.precision):
                return score_candidates(self.model, rows, self.batch_size, self.source)
        except UnreadableImage as error:
            if not self.model.holds_full_parameters:
                raise UserError(str(error)) from error
            raise

    def accuracy(self, scored: list[tuple[Tensor, Tensor]]) -> float:
        """Return the share of rows whose best-scored candidate is correct, as `best_of_n_accuracy` defines it.

        Args:
            scored: what `score_share` gave on this process.
        """
        if self.model.holds_full_parameters:
            scored = [row for part in collectives.all_gather_object(scored) for row in part]
        return best_of_n_accuracy(scored, self.correct, max(map(len, self.correct)))
