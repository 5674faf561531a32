"""Domain-reweighted process reward models.

from reweighting import ProcessRewardModel  # loads torch and transformers; `import reweighting` alone loads nothing
"""

__version__ = "0.1.0"
__all__ = ["ProcessRewardModel"]


def __getattr__(name: str):
    """Load the model's module when it is asked for, so that the checks of a command's flags and rows come fast."""
    if name == "ProcessRewardModel":
        from reweighting.modeling.reward_model import ProcessRewardModel

        return ProcessRewardModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
