"""Idefics3 and SmolVLM: tiles of one size, each labeled with its row and column, then the whole image."""

import functools
import math

import numpy as np
from PIL import Image
from torch import Tensor
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

from reweighting.modeling.families.base import LINEAR_LAYERS, Family


class Idefics3(Family):
    """Define Idefics3 and SmolVLM. Every tile takes the same number of tokens; separator tokens stand between tiles."""

    model_types = ("idefics3", "smolvlm")
    vision_modules = ("vision_model",)
    projector_modules = ("connector",)
    lora_targets = rf"(.*\.)?text_model\..*\.({LINEAR_LAYERS})"
    image_inputs = ("pixel_values", "pixel_attention_mask")

    def placeholder(self, height: int, width: int) -> tuple[str, int]:
        """See `Family.placeholder`."""
        vision = self.config.vision_config
        tokens = int((vision.image_size // vision.patch_size) ** 2 / self.config.scale_factor**2)
        return _tiles(self.image_token, *self.grid(height, width)), tokens

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Count the tiles of an image.

        Args:
            height: of the image, in pixels.
            width: of the image, in pixels.

        Returns:
            Rows and columns of tiles; (0, 0) if the image is not split.
        """
        processor = self.image_processor
        if not processor.do_image_splitting:
            return 0, 0
        # The processor's own count is wrong where its size is not a multiple of a tile's.
        side = processor.max_image_size["longest_edge"]
        longest = processor.size["longest_edge"]
        height, width = get_resize_output_image_size(np.broadcast_to(np.uint8(0), (height, width)), longest)
        if width >= height:
            columns = math.ceil(width / side)
            rows = math.ceil(int(columns * side / (width / height)) / side)
        else:
            rows = math.ceil(height / side)
            columns = math.ceil(int(rows * side * (width / height)) / side)
        return (rows, columns) if rows * columns > 1 else (0, 0)

    def process(self, image: Image.Image) -> dict[str, Tensor]:
        """See `Family.process`; the tiles are on the first axis, [tiles, 1, ...]."""
        return {name: values.transpose(0, 1) for name, values in super().process(image).items()}


@functools.cache
def _tiles(image_token: str, rows: int, columns: int) -> str:
    """Write the text that stands for an image of rows x columns tiles."""
    around, whole = "<fake_token_around_image>", f"<fake_token_around_image><global-img>{image_token}"
    if not rows:
        return f"{whole}{around}"
    lines = ("".join(f"{around}<row_{row + 1}_col_{column + 1}>{image_token}" for column in range(columns))
             for row in range(rows))  # fmt: skip
    return "".join(f"{line}\n" for line in lines) + f"\n{whole}{around}"
