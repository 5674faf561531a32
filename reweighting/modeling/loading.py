"""Load a pretrained backbone and its processors, from a folder or the Hugging Face hub.

No code of a checkpoint is ever run: weights are read from safetensors files only, and `auto_map` entries are refused.
The config is checked before weights are downloaded or read, so that a model that cannot be used fails within seconds.

A text-only backbone may also be a GGUF file, which holds config, tokenizer and quantized weights: transformers unpacks
them.
"""

import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto
from transformers.processing_utils import ProcessorMixin
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, is_gguf_available

from reweighting.errors import UserError
from reweighting.files import digest
from reweighting.modeling.adapters import quantization_config
from reweighting.modeling.config import PRMConfig
from reweighting.modeling.families import FAMILIES, SUPPORTED, family_of
from reweighting.modeling.saved_model import BaseIdentity
from reweighting.terminal import first_line

COUNTS = re.compile(r"(num_.*layers|depth|num_labels)$")  # config entries of which transformers makes as many objects
MAX_COUNT = 1000
GGUF = ".gguf"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def is_gguf(name: str | Path) -> bool:
    """Tell whether a backbone is named as a GGUF file.

    Args:
        name: of a folder or file, or on the Hugging Face hub.

    Returns:
        Whether the name ends in .gguf.
    """
    return str(name).endswith(GGUF)


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Load a backbone's config and check that the model can be used here. Reads no weights.

    Args:
        name: folder, GGUF file, or name on the Hugging Face hub.
        revision: commit on the hub; None: the newest.

    Returns:
        The config.

    Raises:
        UserError: there is none, or the kind of model is not supported.
    """
    if is_gguf(name):
        return _load_gguf_config(name)
    if not os.path.isdir(name) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"there is no folder {name[:200]}, and that is no name on the Hugging Face hub.")
    raw, _ = _load(PreTrainedConfig, name, method="get_config_dict", revision=revision)
    if not isinstance(raw, dict) or "model_type" not in raw:
        if _find(name, "adapter_config.json", revision):
            raise UserError(f"{name} holds adapters without a base: merge them into the base, and name the result.")
        raise UserError(f"{name} cannot be loaded: it holds no config.json that describes a model.")
    model_type = raw["model_type"]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(_unsupported(model_type, raw))
    if _find(name, "adapter_config.json", revision):  # transformers would add these adapters
        raise UserError(f"{name} holds adapters beside the model: merge them, or move adapter_config.json away.")
    if "transformers_weights" in raw:
        raise UserError(f"{name}: config.json names weights of its own (transformers_weights): delete that entry.")
    if large := [key for key, value in _entries(raw) if COUNTS.search(key) and _exceeds(value, MAX_COUNT)]:
        raise UserError(f"{name}: config.json: {large[0]} is more than {MAX_COUNT}; the file is damaged.")
    return _load(AutoConfig, name, revision=revision, trust_remote_code=False)


def _load_gguf_config(name: str) -> PreTrainedConfig:
    """Do the same for a GGUF file."""
    if not is_gguf_available():
        raise UserError(f"{name}: to read a GGUF file, install the package gguf: pip install gguf")
    try:
        modified = os.stat(name).st_mtime_ns
    except (OSError, ValueError) as error:
        raise UserError(f"there is no file {name[:200]}.") from error
    raw = _read_gguf_config(name, modified)
    if raw.get("model_type") not in FAMILIES:
        raise UserError(_unsupported(raw.get("model_type"), raw))
    return AutoConfig.for_model(**raw)


@functools.lru_cache(maxsize=1)
def _read_gguf_config(name: str, modified: int) -> dict[str, Any]:
    """Read the config in a GGUF file, last modified then: several seconds, most of them for its vocabulary."""
    return _load(PreTrainedConfig, name, method="get_config_dict")[0]


def load_backbone(
    name: str,
    config: PRMConfig,
    device: torch.device | str,
    attn_implementation: str,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a backbone without its LM head.

    Args:
        name: folder, or name on the Hugging Face hub.
        config: settings of the reward model; `dtype`, `lora_rank` and `load_in_4bit` count here.
        device: where a 4-bit backbone is put (others come on the CPU); on `meta` no weight is read.
        attn_implementation: "sdpa", "eager" or "flash_attention_2".
        revision: commit on the hub; None: the newest.

    Returns:
        The backbone, in evaluation mode.

    Raises:
        UserError: it cannot be loaded, or a tensor is missing.
    """
    device = torch.device(device)
    found = load_config(name, revision)
    width = found.get_text_config().hidden_size
    if config.lora_rank > width:
        raise UserError(f"--lora_rank {config.lora_rank}: more than the model's hidden size, {width}, adds nothing.")
    if not family_of(found).reads_images:
        for flag in ("freeze_projector", "max_image_side"):
            if getattr(config, flag) is not None:
                raise UserError(f"--{flag} does nothing with {found.model_type} models, which read text only.")
    dtype = getattr(torch, config.dtype)
    if device.type == "meta":
        return AutoModel.from_config(found, dtype=dtype, attn_implementation=attn_implementation)
    if not is_gguf(name):  # whose config comes from the same file as its weights
        _check_weights(name, found, revision)
    options: dict[str, Any] = {}
    if config.load_in_4bit:
        options = {"quantization_config": quantization_config(found, dtype, device), "device_map": {"": device}}
    return _load_weights(
        AutoModel,
        name,
        config=found,
        revision=revision,
        dtype=dtype,
        attn_implementation=attn_implementation,
        key_mapping=family_of(found).key_mapping,
        **options,
    )


def load_generator(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model that writes texts: with its LM head.

    Args:
        name: folder, GGUF file, or name on the Hugging Face hub.
        dtype: of its weights.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        UserError: it cannot be loaded, has no LM head, or lacks another tensor.
    """
    found = load_config(name)
    auto_class, kinds = AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if family_of(found).reads_images:
        auto_class, kinds = AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind = kinds[found.model_type]
    if found.architectures and kind not in found.architectures:
        raise UserError(f"{name} holds a {str(found.architectures[0])[:60]}, which has no LM head and cannot write "
                        f"answers: name a {kind}, as the model that it was made from.")  # fmt: skip
    if not is_gguf(name):
        _check_weights(name, found, None)
    return _load_weights(auto_class, name, config=found, dtype=dtype, attn_implementation="sdpa")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer, with the chat template of the checkpoint's processor if that has one: it places images.

    Args:
        name: folder, or name on the Hugging Face hub.

    Returns:
        The tokenizer.

    Raises:
        UserError: it cannot be loaded.
    """
    if os.path.isdir(name) and not any(os.path.isfile(os.path.join(name, file)) for file in TOKENIZER_FILES):
        raise UserError(f"the folder {name} holds no tokenizer: copy tokenizer.json and the like from the model's.")
    if is_gguf(name):  # AutoTokenizer would read the file once more to choose the same class
        return _load(PreTrainedTokenizerFast, name)
    tokenizer = _load(AutoTokenizer, name, trust_remote_code=False)
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
    return _load(AutoImageProcessor, name, trust_remote_code=False)


def weight_files(name: str, revision: str | None = None) -> list[Path]:
    """List a checkpoint's safetensors files, downloading them from the hub if needed.

    Args:
        name: folder, or name on the Hugging Face hub.
        revision: commit on the hub; None: the newest.

    Returns:
        One file, or the shards that the index names; nothing for a GGUF file.

    Raises:
        UserError: there are none, or the index names other files.
    """
    if is_gguf(name):
        return []
    if single := _find(name, SAFE_WEIGHTS_NAME, revision):
        return [single]
    index = _find(name, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        raise UserError(f"{name} holds no {SAFE_WEIGHTS_NAME}: save the model in that format (save_pretrained does).")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged: {type(error).__name__}") from error
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise UserError(f"{index} names {str(shard)[:60]!r}, which is no safetensors file.")
    files = [_find(name, shard, revision) for shard in shards]
    for shard, file in zip(shards, files, strict=True):
        if file is None:
            raise UserError(f"{name}: {shard} is missing, although {SAFE_WEIGHTS_INDEX_NAME} names it.")
    return [file for file in files if file is not None]


def identify(name: str, revision: str | None = None) -> BaseIdentity:
    """Identify a checkpoint by the digest of its config and weights.

    Args:
        name: folder, GGUF file, or name on the Hugging Face hub.
        revision: commit on the hub; None: the newest.

    Returns:
        The digest, and the commit of a model on the hub.

    Raises:
        UserError: the files cannot be found.
    """
    if is_gguf(name):
        if not os.path.isfile(name):
            raise UserError(f"there is no file {name[:200]}.")
        return BaseIdentity(digest(Path(name)))
    config = _find(name, "config.json", revision)
    if config is None:
        raise UserError(f"{name} holds no config.json.")
    commit = config.parent.name if re.fullmatch("[0-9a-f]{40}", config.parent.name) else None  # in the hub's cache
    return BaseIdentity(digest(config, *weight_files(name, revision)), commit)


def _load_weights(auto_class: Any, name: str, **options: Any) -> PreTrainedModel:
    """Load a model. Raises UserError if a tensor is missing: transformers only warns, and makes a random one."""
    model, info = _load(
        auto_class, name, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"the model {name} lacks {len(missing)} of its tensors, {missing[0]} for one.")
    return model


def _check_weights(name: str, config: PreTrainedConfig, revision: str | None) -> None:
    """Compare the sizes in the config with those of the weights: what does not fit could take any amount of memory."""
    held, vocabulary = 0, None
    for file in weight_files(name, revision):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    shape = tensors.get_slice(key).get_shape()
                    held += math.prod(shape)
                    if key.endswith("embed_tokens.weight"):
                        vocabulary = shape[0]
        except Exception as error:  # safetensors raises its own kinds
            raise UserError(f"{file} is damaged: {first_line(error)}") from error
    rows = config.get_text_config().vocab_size
    if vocabulary not in (None, rows):
        raise UserError(
            f"{name}: the weights hold {vocabulary} token embeddings, and config.json says {rows} (vocab_size). Resize "
            "them with model.resize_token_embeddings and save the whole model, or correct config.json."
        )
    if getattr(config, "quantization_config", None) is not None:  # packed weights
        return
    with torch.device("meta"):
        described = sum(parameter.numel() for parameter in _skeleton(name, config).parameters())
    if described > 2 * held:  # missing tensors are reported by name later
        raise UserError(f"{name}: config.json describes {described:,} parameters, and the weights hold {held:,}: one "
                        "of the files is damaged, or of another model.")  # fmt: skip


def _skeleton(name: str, config: PreTrainedConfig) -> nn.Module:
    """Make the model without weights."""
    try:
        return AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises any kind for a config that makes no sense
        raise UserError(f"{name}: config.json describes no model: {first_line(error)}") from error


def _unsupported(model_type: object, raw: dict[str, Any]) -> str:
    """Say that a kind of model is not supported, and what is."""
    text = f"{str(model_type)[:60]} models are not supported (supported: {SUPPORTED})"
    if model_type == "internvl_chat":
        return f"{text}. Use the checkpoint in transformers' own classes, whose name ends in -hf."
    if "auto_map" in raw:
        return f"{text}. It comes with code of its own (auto_map), which is never run here."
    return f"{text}; reweighting/modeling/families/__init__.py explains how to add a family."


def _find(name: str, file: str, revision: str | None) -> Path | None:
    """Find a file of a checkpoint, in its folder or on the hub; None if there is none."""
    if os.path.isdir(name):
        path = Path(name, file)
        return path if path.is_file() else None
    found = _load_file(name, file, revision)
    return None if found is None else Path(found)


def _load_file(name: str, file: str, revision: str | None) -> str | None:
    try:
        return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UserError(_failure(name, "checkpoint", error)) from error


def _entries(value: Any) -> list[tuple[str, Any]]:
    """List all (key, value) of nested objects."""
    pairs: list[tuple[str, Any]] = []
    for key, entry in value.items():
        pairs.append((key, entry))
        if isinstance(entry, dict):
            pairs += _entries(entry)
    return pairs


def _exceeds(value: object, limit: int) -> bool:
    return isinstance(value, int | float) and not value <= limit


def _load(auto_class: Any, name: str, method: str = "from_pretrained", **options: Any) -> Any:
    """Call a transformers class; its many kinds of errors become one line that names the remedy."""
    place = name
    if is_gguf(name):  # transformers takes the file's folder and name
        place, options["gguf_file"] = os.path.split(os.path.abspath(name))
    try:
        return getattr(auto_class, method)(place, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files end in nearly every kind
        raise UserError(_failure(name, f"transformers' {auto_class.__name__}", error)) from error


def _failure(name: str, loader: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        reason = "it needs code of its own (auto_map), which is never run here: use a checkpoint that needs none"
    else:
        reason = first_line(error)
    if os.path.isdir(name) or is_gguf(name):
        return f"the {'file' if is_gguf(name) else 'folder'} {name} cannot be loaded by {loader} ({reason})."
    return f"there is no folder {name}, and no model of that name came from the Hugging Face hub ({reason})."
