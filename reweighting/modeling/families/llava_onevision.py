"""LLaVA-OneVision: the whole image, then tiles of a grid that fits its shape, with a newline token after each row."""

import math

import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image

from reweighting.modeling.families.base import Family


class LlavaOnevision(Family):
    """Define LLaVA-OneVision. The tiles' tokens are cropped to the image's shape: their number depends on its size."""

    model_types = ("llava_onevision",)
    vision_modules = ("vision_tower",)
    projector_modules = ("multi_modal_projector", "image_newline")
    image_inputs = ("pixel_values", "image_sizes")

    def placeholder(self, height: int, width: int) -> tuple[str, int]:
        """See `Family.placeholder`; counts like the model's own `pack_image_features`."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        rows, columns = get_anyres_image_grid_shape(
            (height, width), self.config.image_grid_pinpoints, vision.image_size
        )
        tiles = torch.empty(1, rows * side, columns * side, device="meta")
        _, rows, columns = unpad_image(tiles, (height, width)).shape
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return self.image_token, side**2 + rows * (columns + 1)

    def process(self, image: Image.Image) -> dict[str, Tensor]:
        """See `Family.process`."""
        inputs = super().process(image)
        return {**inputs, "pixel_values": inputs["pixel_values"][0]}  # [tiles, 3, height, width]
