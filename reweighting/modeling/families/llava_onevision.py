"""LLaVA-OneVision: the whole image, then tiles of a grid that fits its shape, with a newline token after each row.

Of several images to a question only the whole ones are read, each padded to a square.
"""

import functools
import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image

from reweighting.modeling.families.base import Family

if TYPE_CHECKING:
    from reweighting.modeling.collate import Tokens

IMAGES_OF_TEXTS = "batch_num_images"  # the model's input: how many images each text has; here 1 or 2 for each image


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
        one = torch.ones(1, dtype=torch.int64)
        return {**inputs, "pixel_values": inputs["pixel_values"][0], IMAGES_OF_TEXTS: one}  # [tiles, 3, height, width]

    def model_inputs(self, tokens: "Tokens") -> dict[str, Any]:
        """See `Family.model_inputs`."""
        inputs = super().model_inputs(tokens)
        if IMAGES_OF_TEXTS in inputs:
            counts: list[int] = []
            # The model only asks whether an image is its text's only one, so that neighbours may count as one text.
            for count, images in itertools.groupby(inputs[IMAGES_OF_TEXTS].tolist()):
                length = len(list(images))
                counts += [1] * length if count == 1 else [length]
            inputs[IMAGES_OF_TEXTS] = torch.tensor(counts)
        return inputs

    def among(self, images: int) -> Family:
        """See `Family.among`."""
        return self if images < 2 else self._untiled

    @functools.cached_property
    def _untiled(self) -> Family:
        return _UntiledLlavaOnevision(self.config, self.tokenizer, self.image_processor)


class _UntiledLlavaOnevision(LlavaOnevision):
    """How LLaVA-OneVision reads each of several images."""

    def placeholder(self, height: int, width: int) -> tuple[str, int]:
        """See `Family.placeholder`: the tokens of one tile and a newline."""
        vision = self.config.vision_config
        return self.image_token, (vision.image_size // vision.patch_size) ** 2 + 1

    def process(self, image: Image.Image) -> dict[str, Tensor]:
        """See `Family.process`."""
        # The processor leaves images of one list whole, if there are several.
        processed = self.image_processor(images=[[image, image]], return_tensors="pt")
        return {
            "pixel_values": processed["pixel_values"][0].float(),  # [1, 3, height, width]
            "image_sizes": processed["image_sizes"][:1].long(),
            IMAGES_OF_TEXTS: torch.full((1,), 2),
        }
