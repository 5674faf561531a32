"""Load the parts of a reward model from where `sources.py` says that they are."""

from typing import cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from reweighting.errors import UserError
from reweighting.modeling.adapters import add_adapters, load_trained
from reweighting.modeling.families import family_of
from reweighting.modeling.loading import load_backbone, load_image_processor, load_tokenizer
from reweighting.modeling.sources import HEAD_FILE, ModelSource, TrainedParts
from reweighting.modeling.tokenization import ChainTokenizer
from reweighting.terminal import first_line


def load_parts(
    source: ModelSource, device: torch.device, attn_implementation: str, cache_bytes: int
) -> tuple[PreTrainedModel | PeftModel, ChainTokenizer]:
    """Load a backbone, with new adapters if it has any, and the tokenizer that feeds it.

    Args:
        source: where they are.
        device: on `meta` no weight is read.
        attn_implementation: "sdpa", "eager" or "flash_attention_2".
        cache_bytes: memory for processed images and tokens.

    Returns:
        The backbone and the tokenizer.

    Raises:
        UserError: a file is missing, damaged or not supported.
    """
    config = source.config
    base = load_backbone(source.base_name, config, device, attn_implementation, source.revision)
    chain_tokenizer = ChainTokenizer(
        load_tokenizer(source.processors),
        load_image_processor(source.processors) if family_of(base.config).reads_images else None,
        base.config,
        max_length=config.max_length,
        max_image_side=config.max_image_side,
        cache_bytes=cache_bytes,
    )
    chain_tokenizer.check_vocabulary(cast(nn.Embedding, base.get_input_embeddings()).weight.shape[0])
    return add_adapters(base, config) if config.adapted else base, chain_tokenizer


def load_saved_weights(backbone: PreTrainedModel | PeftModel, head: nn.Module, saved: TrainedParts) -> None:
    """Load what is saved besides the backbone: the head, adapters and projector.

    Args:
        backbone: changed in place.
        head: changed in place.
        saved: where the weights are.

    Raises:
        UserError: a file is damaged or does not fit.
    """
    try:
        head.load_state_dict(load_file(saved.folder / HEAD_FILE))
        if saved.config.adapted:
            load_trained(backbone, saved.config, saved.folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{saved.folder}: a file of the saved reward model is damaged: {first_line(error)}") from error
