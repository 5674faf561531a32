"""Load a pretrained backbone and its processors, from a folder or the Hugging Face hub.

Only safetensors files are read: other weight files may run any code that they hold.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.processing_utils import ProcessorMixin

from reweighting.errors import UserError
from reweighting.modeling.adapters import quantization_config
from reweighting.modeling.config import PRMConfig


def load_backbone(
    name: str, config: PRMConfig, device: torch.device | str, attn_implementation: str
) -> PreTrainedModel:
    """Load a backbone without its LM head.

    Args:
        name: folder, or name on the Hugging Face hub.
        config: settings of the reward model; `dtype` and `load_in_4bit` count here.
        device: where a 4-bit backbone is put (others come on the CPU); on `meta` no weight is read.
        attn_implementation: "sdpa", "eager" or "flash_attention_2".

    Returns:
        The backbone, in evaluation mode.

    Raises:
        UserError: it cannot be loaded, or a tensor is missing.
    """
    device = torch.device(device)
    found = _load(AutoConfig, name)  # first, because errors about weights are less clear
    dtype, options = getattr(torch, config.dtype), {}
    if device.type == "meta":
        return AutoModel.from_config(found, dtype=dtype, attn_implementation=attn_implementation)
    if config.load_in_4bit:
        options = {"quantization_config": quantization_config(found, dtype, device), "device_map": {"": device}}
    backbone, info = _load(
        AutoModel,
        name,
        dtype=dtype,
        attn_implementation=attn_implementation,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    # transformers only warns, and continues with random weights.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"the backbone {name} lacks {len(missing)} of its tensors, {missing[0]} for one.")
    return backbone


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer, with the chat template of the checkpoint's processor if that has one: it places images.

    Args:
        name: folder, or name on the Hugging Face hub.

    Returns:
        The tokenizer.

    Raises:
        UserError: it cannot be loaded.
    """
    tokenizer = _load(AutoTokenizer, name)
    processor, _ = _load(ProcessorMixin, name, method="get_processor_dict")
    tokenizer.chat_template = processor.get("chat_template") or tokenizer.chat_template
    return tokenizer


def load_image_processor(name: str) -> Any:
    """Load an image processor.

    Args:
        name: folder, or name on the Hugging Face hub.

    Returns:
        A transformers image processor.

    Raises:
        UserError: it cannot be loaded.
    """
    return _load(AutoImageProcessor, name)


def _load(auto_class: Any, name: str, method: str = "from_pretrained", **options: Any) -> Any:
    """Call `auto_class.from_pretrained`; its many kinds of errors become one line that names the remedy."""
    try:
        return getattr(auto_class, method)(name, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if Path(name).is_dir():
            problem = f"the folder {name} cannot be loaded by transformers' {auto_class.__name__}"
        else:
            problem = f"there is no folder {name}, and no model of that name came from the Hugging Face hub"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{problem} ({reason[0]}).") from error
