"""Gemma 3 (4B and larger; the 1B model takes no images): every image takes the same number of tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from reweighting.modeling.families.base import Family


class Gemma3(Family):
    """Define Gemma 3. An image's tokens attend to each other in both directions."""

    model_types = ("gemma3",)
    vision_modules = ("vision_tower",)
    projector_modules = ("multi_modal_projector",)
    processor_options = {"do_pan_and_scan": False}  # as Gemma3Processor sets it
    token_types = "token_type_ids"

    def __init__(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, image_processor: Any):
        super().__init__(config, tokenizer, image_processor)
        ends = [config.boi_token_index, config.eoi_token_index]
        self.template_token, self.end = tokenizer.convert_ids_to_tokens(ends)

    def placeholder(self, height: int, width: int) -> tuple[str, int]:
        """See `Family.placeholder`."""
        text = f"\n\n{self.template_token}{self.image_token}{self.end}\n\n"
        return text, self.config.mm_tokens_per_image

    def pack_features(self, features: Sequence[Tensor]) -> BaseModelOutputWithPooling:
        """See `Family.pack_features`."""
        return BaseModelOutputWithPooling(pooler_output=torch.cat(list(features)))
