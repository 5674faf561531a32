"""What a family of models defines, with the defaults that most families share."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

if TYPE_CHECKING:
    from reweighting.modeling.collate import Tokens

LINEAR_LAYERS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"  # of a decoder's attention and MLP


class Family:
    """Define how a family turns texts and images into tokens and model inputs, and where its parts are.

    Module names are those inside the backbone without its LM head; a name may also be a parameter's.

    Args:
        config: the backbone's.
        tokenizer: the backbone's.
        image_processor: the backbone's, a transformers image processor; None for a family that reads no images.

    Attributes:
        model_types: the values of `config.model_type` that belong to the family.
        reads_images: the models have a vision tower; where False, nothing about images below is used.
        vision_modules: names of the vision tower.
        projector_modules: names of the layers between vision tower and language model.
        lora_targets: regular expression that matches the full names of the language model's linear layers only, or
            "all-linear": every linear layer of the backbone, of which the LM head is no part.
        plain_image: stands for an image in a prompt if the tokenizer has no chat template; None: `template_token`.
        processor_options: keyword arguments for the image processor besides the image.
        image_inputs: outputs of the image processor that the model takes, pixel values first.
        kept_inputs: those of `image_inputs` that the model needs even if it gets an image's features.
        key_mapping: renames tensors of a checkpoint, for layouts that transformers' base class does not know; see
            `from_pretrained` in transformers.
        token_types: the model's name for the tensor [B, T] that is 1 at image tokens; None: it takes none.
        image_token_id: id of the token that the image's features replace; -1: there is none.
        image_token: the same token as text; empty: there is none.
        template_token: stands for the whole image in the chat template; empty: there is none.
        shares_prompts: several answers can continue from one pass over their prompt.
    """

    model_types: tuple[str, ...]
    reads_images = True
    vision_modules: tuple[str, ...] = ()
    projector_modules: tuple[str, ...] = ()
    lora_targets = rf"(.*\.)?language_model\..*\.({LINEAR_LAYERS})"
    plain_image: str | None = None
    processor_options: dict[str, bool] = {}
    image_inputs: tuple[str, ...] = ("pixel_values",)
    kept_inputs: tuple[str, ...] = ()
    key_mapping: dict[str, str] | None = None
    token_types: str | None = None

    def __init__(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, image_processor: Any):
        self.config, self.tokenizer, self.image_processor = config, tokenizer, image_processor
        self.image_token_id = -1
        self.image_token = ""
        if self.reads_images:
            self.image_token_id = config.image_token_id
            self.image_token = cast(str, tokenizer.convert_ids_to_tokens(config.image_token_id))
        self.template_token = self.image_token
        # A sliding window would count the padding between a prompt and the steps that follow it.
        text = config.get_text_config()
        window = getattr(text, "sliding_window", None)
        layers = getattr(text, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
        self.shares_prompts = set(layers) == {"full_attention"}

    def among(self, images: int) -> "Family":
        """Return the family as it reads each image of a question: the same one, unless their number matters.

        Args:
            images: how many the question has.
        """
        return self

    def placeholder(self, height: int, width: int) -> tuple[str, int]:
        """Describe what replaces the template token for one image.

        Args:
            height: of the image, in pixels.
            width: of the image, in pixels.

        Returns:
            A text, and how many tokens each image token in it stands for.

        Raises:
            ValueError: the family cannot read images of this shape.
        """
        raise NotImplementedError

    def process(self, image: Image.Image) -> dict[str, Tensor]:
        """Turn an image into the model's inputs.

        Args:
            image: RGB.

        Returns:
            The tensors named in `image_inputs`, such that several images can be concatenated along the first axis.
            Floats are float32, integers int64.
        """
        processed = self.image_processor(images=[image], return_tensors="pt", **self.processor_options)
        inputs = {name: processed[name] for name in self.image_inputs}
        return {name: x.float() if x.is_floating_point() else x.long() for name, x in inputs.items()}

    def encode_image(self, backbone: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Run the vision tower and the projector on one image.

        Args:
            backbone: a transformers model of this family.
            inputs: from `process`.

        Returns:
            Features [image tokens, D].
        """
        return torch.cat(list(backbone.get_image_features(**inputs, return_dict=True).pooler_output))

    def pack_features(self, features: Sequence[Tensor]) -> BaseModelOutputWithPooling:
        """Pack the features of a batch's images in the form that the backbone takes.

        Args:
            features: from `encode_image`, one tensor an image.

        Returns:
            The value for `mm_encoder_outputs["image"]`.
        """
        return BaseModelOutputWithPooling(pooler_output=cast(Any, features))  # one tensor an image

    def model_inputs(self, tokens: "Tokens") -> dict[str, Any]:
        """Name the backbone's keyword arguments.

        Args:
            tokens: texts [B, T] with their images.

        Returns:
            Keyword arguments for the backbone.
        """
        inputs: dict[str, Any] = {
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            **tokens.images,
        }
        if self.token_types is not None:
            inputs[self.token_types] = tokens.is_image
        if tokens.image_features is not None:
            inputs["mm_encoder_outputs"] = {"image": self.pack_features(tokens.image_features)}
        return inputs

    def position_ids(self, backbone: Any, inputs: dict[str, Any]) -> Tensor | None:
        """Compute the position ids that the backbone itself would use.

        Args:
            backbone: a transformers model of this family.
            inputs: from `model_inputs`.

        Returns:
            Position ids [..., B, T]; None where they are 0 ... T - 1.
        """
        return None


def parameters_of(backbone: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """Collect the parameters of some modules.

    Args:
        backbone: the model.
        names: of modules or parameters inside it.

    Returns:
        Their parameters, in the backbone's order.
    """
    starts = tuple(f"{name}." for name in names)
    return [parameter for name, parameter in backbone.named_parameters() if f"{name}.".startswith(starts)]
