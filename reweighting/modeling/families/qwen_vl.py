"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: an image of any size is a grid of patches, merged 2 x 2 into tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from reweighting.modeling.families.base import Family


class QwenVL(Family):
    """Define Qwen2-VL and Qwen2.5-VL. Positions have three axes (M-RoPE); an image's depend on its grid of patches."""

    model_types = ("qwen2_vl", "qwen2_5_vl")
    vision_modules = ("visual",)
    projector_modules = ("visual.merger",)
    plain_image = "<|vision_start|><|image_pad|><|vision_end|>"
    image_inputs = ("pixel_values", "image_grid_thw")
    kept_inputs = ("image_grid_thw",)
    key_mapping = {r"^model\.visual": "visual"}  # as FSDP and DeepSpeed write it; else it counts as language model
    token_types = "mm_token_type_ids"

    def placeholder(self, height: int, width: int) -> tuple[str, int]:
        """See `Family.placeholder`."""
        patches = self.image_processor.get_number_of_image_patches(height, width)
        return self.image_token, patches // self.image_processor.merge_size**2

    def position_ids(self, backbone: Any, inputs: dict[str, Any]) -> Tensor | None:
        """See `Family.position_ids`; [3, B, T] are time, height and width, which differ inside an image."""
        names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        return backbone.get_rope_index(**{n: inputs[n] for n in names})[0] if "image_grid_thw" in inputs else None


class Qwen3VL(QwenVL):
    """Define Qwen3-VL. Its first decoder layers also take features from inside the vision tower (deepstack): an image's
    features are those of the last layer and of these layers, side by side."""

    model_types = ("qwen3_vl",)
    projector_modules = ("visual.merger", "visual.deepstack_merger_list")

    def encode_image(self, backbone: Any, inputs: dict[str, Tensor]) -> Tensor:
        """See `Family.encode_image`; returns [image tokens, D * (1 + deepstack layers)]."""
        found = backbone.get_image_features(**inputs, return_dict=True)
        return torch.cat([torch.cat(layer) for layer in (found.pooler_output, *found.deepstack_features)], dim=-1)

    def pack_features(self, features: Sequence[Tensor]) -> BaseModelOutputWithDeepstackFeatures:
        """See `Family.pack_features`."""
        width = self.config.get_text_config().hidden_size
        layers: list[Any] = list(zip(*(image.split(width, dim=-1) for image in features), strict=True))
        return BaseModelOutputWithDeepstackFeatures(pooler_output=layers[0], deepstack_features=layers[1:])
