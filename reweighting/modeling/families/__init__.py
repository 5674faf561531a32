"""Families of models: one small class each for what differs between them.

The backbone's `config.model_type` selects the family. All text-only models share one, `CausalLM`. To add a family of
vision-language models: write a subclass of `base.Family` in a new module here, add it to `VISION_LANGUAGE`, add a
builder of a small random model to `tests/tiny_families.py`, and add its row to the table of models in the
documentation; the tests in `tests/modeling/test_families.py` then run for it too.
"""

from transformers import PreTrainedConfig

from reweighting.errors import UserError
from reweighting.modeling.families.base import Family, parameters_of
from reweighting.modeling.families.causal_lm import CausalLM
from reweighting.modeling.families.gemma3 import Gemma3
from reweighting.modeling.families.idefics3 import Idefics3
from reweighting.modeling.families.internvl import InternVL
from reweighting.modeling.families.llava_onevision import LlavaOnevision
from reweighting.modeling.families.qwen_vl import Qwen3VL, QwenVL

VISION_LANGUAGE: dict[str, type[Family]] = {
    model_type: family
    for family in (QwenVL, Qwen3VL, LlavaOnevision, InternVL, Idefics3, Gemma3)
    for model_type in family.model_types
}
FAMILIES: dict[str, type[Family]] = dict.fromkeys(CausalLM.model_types, CausalLM) | VISION_LANGUAGE
SUPPORTED = f"{', '.join(VISION_LANGUAGE)}, and text-only causal language models of transformers"  # in messages

__all__ = ["FAMILIES", "SUPPORTED", "VISION_LANGUAGE", "Family", "family_of", "parameters_of"]


def family_of(config: PreTrainedConfig) -> type[Family]:
    """Find the family of a backbone.

    Args:
        config: the backbone's.

    Returns:
        The family's class.

    Raises:
        UserError: no family here knows this kind of model.
    """
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{config.model_type} models are not supported (supported: {SUPPORTED}); "
            "reweighting/modeling/families/__init__.py explains how to add a family."
        )
    return FAMILIES[config.model_type]
