"""A trained reward model ready to score, as the commands' flags ask for it."""

from argparse import Namespace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from reweighting.devices import autocast, choose_device, choose_precision
from reweighting.modeling.config import CONFIG_FILE
from reweighting.modeling.reward_model import ProcessRewardModel


class Scorer:
    """The model of `--weights_path` on its device; `with scorer.autocast():` sets the precision.

    Attributes: `model`, `precision` ("bf16" or "fp32"), `aggregation` (a name of `aggregation.AGGREGATIONS`).
    Raises UserError if there is no model, or no such device.
    """

    def __init__(self, args: Namespace):
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.device = choose_device(args.device)
        self.precision = choose_precision(args.precision, self.device)
        self.model = ProcessRewardModel.from_pretrained(model_folder(args.weights_path), device=self.device)
        self.aggregation = getattr(args, "aggregation_function", None) or self.model.config.aggregation

    def autocast(self) -> torch.autocast:
        """The context to score in."""
        return autocast(self.device, self.precision)


def model_folder(weights_path: str) -> Path:
    """The folder of the model itself: what is given, or the `prm` in it."""
    folder = Path(weights_path)
    return folder if (folder / CONFIG_FILE).is_file() else folder / "prm"
