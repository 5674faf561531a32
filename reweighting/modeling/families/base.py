"""What every family of vision-language models is asked, and the answers that most of them share."""

from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

LINEAR_LAYERS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"  # of a decoder's attention and MLP


class Family:
    """How one family turns an image into tokens and inputs, and where its parts are.

    Names of modules are those inside the backbone without its LM head; a name may also be a parameter's.

    model_types: the `config.model_type`s of the family.
    vision_modules, projector_modules: the vision tower, and what takes its output to the language model.
    lora_targets: regular expression that the full names of the language model's linear layers match, and no other.
    plain_image: an image in a prompt, where the tokenizer has no chat template; None: `template_token`.
    processor_options: what the image processor is called with beside the image.
    image_inputs: what it gives that the model takes, pixel values first; `kept_inputs`: those the model also wants
    beside an image's features.
    token_types: the model's name for the tensor [B, T] that is 1 at image tokens; None: it takes none.

    Attributes: `image_token_id` and `image_token`, where the image's features go; `template_token`, which stands for
    the whole image in the chat template; `shares_prompts`: several answers may go on from one pass over their prompt.
    """

    model_types: tuple[str, ...]
    vision_modules: tuple[str, ...]
    projector_modules: tuple[str, ...]
    lora_targets = rf"(.*\.)?language_model\..*\.({LINEAR_LAYERS})"
    plain_image: str | None = None
    processor_options: dict = {}
    image_inputs: tuple[str, ...] = ("pixel_values",)
    kept_inputs: tuple[str, ...] = ()
    token_types: str | None = None

    def __init__(self, config, tokenizer, image_processor):
        self.config, self.tokenizer, self.image_processor = config, tokenizer, image_processor
        self.image_token_id: int = config.image_token_id
        self.image_token: str = tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.template_token = self.image_token
        # A sliding window would count the padding between a prompt and what follows it.
        layers = getattr(config.get_text_config(), "layer_types", None) or ()
        self.shares_prompts = "sliding_attention" not in layers

    def placeholder(self, height: int, width: int) -> tuple[str, int]:
        """What takes the template token's place for an image of this size, in pixels: a text, and how many tokens each
        image token in it stands for. Raises ValueError for a shape that the family cannot read."""
        raise NotImplementedError

    def process(self, image: Image.Image) -> dict[str, Tensor]:
        """The image as the model takes it: `image_inputs`, such that those of several images are joined along their
        first axis. Floats are float32."""
        processed = self.image_processor(images=[image], return_tensors="pt", **self.processor_options)
        inputs = {name: processed[name] for name in self.image_inputs}
        return {name: x.float() if x.is_floating_point() else x.long() for name, x in inputs.items()}

    def encode_image(self, backbone: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """What the tower and the projector make of one image: features [image tokens, D]."""
        return torch.cat(list(backbone.get_image_features(**inputs, return_dict=True).pooler_output))

    def pack_features(self, features: Sequence[Tensor]) -> BaseModelOutputWithPooling:
        """The features of a batch's images, in the form in which the backbone takes them back."""
        return BaseModelOutputWithPooling(pooler_output=features)

    def model_inputs(self, tokens) -> dict[str, Tensor]:
        """The backbone's keyword arguments for `collate.Tokens`."""
        inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, **tokens.images}
        if self.token_types is not None:
            inputs[self.token_types] = tokens.is_image
        if tokens.image_features is not None:
            inputs["mm_encoder_outputs"] = {"image": self.pack_features(tokens.image_features)}
        return inputs

    def position_ids(self, backbone: nn.Module, inputs: dict[str, Tensor]) -> Tensor | None:
        """Position ids for `model_inputs`, as the backbone would make them; None where they are just 0 … T - 1."""
        return None


def parameters_of(backbone: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """The parameters of the modules (or the parameters) with these names inside a backbone."""
    starts = tuple(f"{name}." for name in names)
    return [parameter for name, parameter in backbone.named_parameters() if f"{name}.".startswith(starts)]
