"""Families of vision-language models: a small adapter each for what truly differs between them.

A family is chosen by the backbone's `config.model_type`. To add one: write a subclass of `base.Family` in a module of
its own here, put it into `FAMILIES`, give `tests/tiny_families.py` a builder of a small random model of it, and add
its row to the matrix in the README; `tests/modeling/test_families.py` then asks of it what it asks of all.
"""

from reweighting.errors import UserError
from reweighting.modeling.families.base import Family, parameters_of
from reweighting.modeling.families.gemma3 import Gemma3
from reweighting.modeling.families.idefics3 import Idefics3
from reweighting.modeling.families.internvl import InternVL
from reweighting.modeling.families.llava_onevision import LlavaOnevision
from reweighting.modeling.families.qwen_vl import Qwen3VL, QwenVL

FAMILIES: dict[str, type[Family]] = {
    model_type: family
    for family in (QwenVL, Qwen3VL, LlavaOnevision, InternVL, Idefics3, Gemma3)
    for model_type in family.model_types
}

__all__ = ["FAMILIES", "Family", "family_of", "parameters_of"]


def family_of(config) -> type[Family]:
    """The family of a backbone with this config. Raises UserError if there is none."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"a {config.model_type} model is of no family that is known here ({', '.join(FAMILIES)}); "
            "reweighting/families/__init__.py says how to add one."
        )
    return FAMILIES[config.model_type]
