"""Best-of-N accuracy on the candidates of `--validation_json_file`, by which the best checkpoint is chosen."""

import torch

from reweighting.data.chains import Chain, candidate_chains
from reweighting.data.schema import CandidateRow
from reweighting.devices import autocast
from reweighting.distributed import collectives
from reweighting.errors import UnreadableImage, UserError
from reweighting.inference.candidates import best_of_n_accuracy, score_candidates
from reweighting.modeling.reward_model import ProcessRewardModel


class Validation:
    """Scores candidates with the model as it is, all processes together.

    rows: the candidates, from the file `name`; right: whether each is. batch_size: answers scored at a time.
    """

    def __init__(
        self,
        model: ProcessRewardModel,
        rows: list[CandidateRow],
        right: list[list[bool]],
        name: str,
        batch_size: int,
        device: torch.device,
        precision: str,
    ):
        self.model, self.rows, self.right, self.name, self.batch_size = model, rows, right, name, batch_size
        self.device, self.precision = device, precision

    def chains(self) -> list[Chain]:
        """All that will be scored."""
        return [chain for row in self.rows for chain in candidate_chains(row, self.name)]

    def score_share(self) -> list:
        """The scores of this process's share of the rows; of a model that is cut into parts, which scores them all at
        once, of all rows. Raises UnreadableImage if one cannot be read and the others can wait for it."""
        rows = collectives.local_slice(self.rows) if self.model.holds_full_parameters else self.rows
        try:
            with autocast(self.device, self.precision):
                return score_candidates(self.model, rows, self.batch_size, self.name)
        except UnreadableImage as error:
            if not self.model.holds_full_parameters:  # the others wait inside the model: this process cannot try again
                raise UserError(str(error)) from error
            raise

    def accuracy(self, scored: list) -> float:
        """The share of rows whose best-scored candidate is right, from what `score_share` gave in each process."""
        if self.model.holds_full_parameters:
            scored = [row for share in collectives.all_gather_object(scored) for row in share]
        return best_of_n_accuracy(scored, self.right, max(map(len, self.right)))
