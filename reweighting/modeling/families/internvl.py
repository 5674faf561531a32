"""InternVL (2.5, 3, 3.5) in transformers' own classes, the `-hf` checkpoints: tiles of one size and the whole image."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from reweighting.modeling.families.base import Family


class InternVL(Family):
    """Define InternVL. Every tile takes the same number of tokens."""

    model_types = ("internvl",)
    vision_modules = ("vision_tower",)
    projector_modules = ("multi_modal_projector",)
    processor_options = {"crop_to_patches": True}  # as InternVLProcessor sets it; the checkpoints' files say False

    def placeholder(self, height: int, width: int) -> tuple[str, int]:
        """See `Family.placeholder`."""
        vision = self.config.vision_config
        grid = [side // patch for side, patch in zip(vision.image_size, vision.patch_size, strict=True)]
        tokens = int(grid[0] * grid[1] * self.config.downsample_ratio**2)
        tiles = self.image_processor.get_number_of_image_patches(height, width, dict(self.processor_options))
        return f"<img>{self.image_token}</img>", tokens * tiles

    def pack_features(self, features: Sequence[Tensor]) -> BaseModelOutputWithPooling:
        """See `Family.pack_features`."""
        return BaseModelOutputWithPooling(pooler_output=torch.cat(list(features)))
