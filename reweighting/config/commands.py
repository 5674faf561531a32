"""The flags of every command, by the name of its module."""

from reweighting.config.conversion import ConvertConfig
from reweighting.config.inference import BestOfNConfig, EvaluateConfig, ShowConfig
from reweighting.config.labeling import LabelConfig
from reweighting.config.parsing import CommandConfig
from reweighting.config.training import TrainingConfig

CONFIGS: dict[str, type[CommandConfig]] = {
    "reweighting.main": TrainingConfig,
    "reweighting.best_of_n": BestOfNConfig,
    "reweighting.evaluate": EvaluateConfig,
    "reweighting.convert": ConvertConfig,
    "reweighting.label": LabelConfig,
    "reweighting.show": ShowConfig,
}
