"""Decoder-only causal language models of transformers: Qwen2 and 3, Llama, SmolLM, Mistral, Phi, Gemma and others."""

from typing import NoReturn

from transformers.models.auto import modeling_auto

from reweighting.errors import UserError
from reweighting.modeling.families.base import Family

OTHER_KINDS = (  # which also generate: encoders with a decoder's switch, decoders that need an encoder or images
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
NOT_CAUSAL = ("bert-generation", "cpmant", "xlnet")  # earlier tokens attend to later ones: scores would depend on them
NOT_TEXT = ("moshi", "musicgen", "musicgen_melody")
NO_ATTENTION = ("rwkv", "xlstm")  # and no cache of the usual form


class CausalLM(Family):
    """Define text-only decoders. Adapters sit on all their linear layers, whatever these are called, fused or not."""

    model_types = tuple(
        name
        for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if name in modeling_auto.MODEL_MAPPING_NAMES
        and not any(name in kind for kind in (*OTHER_KINDS, NOT_CAUSAL, NOT_TEXT, NO_ATTENTION))
    )
    reads_images = False
    lora_targets = "all-linear"  # peft's name for them

    def placeholder(self, height: int, width: int) -> NoReturn:
        """See `Family.placeholder`."""
        raise UserError(
            f"it has an image, and {self.config.model_type} models read text only: leave the images out with "
            "--ignore_images, or name a vision-language model as --reward_model"
        )
