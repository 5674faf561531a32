"""A trained reward model ready to score, as the commands' flags ask for it."""

from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from reweighting.config.inference import ScoringConfig
from reweighting.devices import autocast, choose_device, choose_precision
from reweighting.errors import UserError
from reweighting.files import digest
from reweighting.modeling.aggregation import AggregationName
from reweighting.modeling.config import CONFIG_FILE
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.modeling.saved_model import SavedModel


class Scorer:
    """The reward model of `--weights_path` on its device.

    Attributes:
        folder: of the saved model.
        model: in eval mode.
        device: where it computes.
        precision: "bf16" or "fp32".
        aggregation: how steps become one number.
    """

    def __init__(self, config: ScoringConfig, aggregation: AggregationName | None = None):
        """Load the model.

        Args:
            config: the flags.
            aggregation: None: the one that the model was trained for.

        Raises:
            UserError: if there is no model, no such device, or `--backbone` would do nothing.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.device = choose_device(config.device)
        self.precision = choose_precision(config.precision, self.device)
        self.folder = model_folder(config.weights_path)
        if config.backbone is not None and SavedModel.read(self.folder).config.train == "full":
            raise UserError(f"--backbone does nothing: {self.folder} holds the whole backbone. Leave it out.")
        self.model = ProcessRewardModel.from_pretrained(
            self.folder,
            backbone=config.backbone,
            allow_changed_base=config.allow_changed_base,
            device=self.device,
        )
        self.aggregation = aggregation or self.model.config.aggregation

    def autocast(self) -> torch.autocast:
        """Return the context to score in, which sets the precision."""
        return autocast(self.device, self.precision)

    def identity(self) -> dict[str, str | None]:
        """Return what tells this model's scores from those of others, beside the input and the batches."""
        config_file, base = self.folder / CONFIG_FILE, self.model.base_identity
        # The config holds a digest of each other file, checked on loading; that of an earlier version does not.
        listed = SavedModel.read(self.folder).files is not None
        files = [config_file] if listed else sorted(path for path in self.folder.iterdir() if path.is_file())
        return {
            "reward model": digest(*files),
            "base": base.digest if base is not None else None,
            "aggregation_function": self.aggregation,
            "precision": self.precision,
            "device": self.device.type,
        }


def model_folder(weights_path: str) -> Path:
    """Return the folder of the model itself: what is given, or the `prm` in it."""
    folder = Path(weights_path)
    return folder if (folder / CONFIG_FILE).is_file() else folder / "prm"
