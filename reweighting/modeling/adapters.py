"""Set which weights of a backbone are trained, and save and load only these.

A frozen base may be bfloat16 or 4-bit. Whatever is trained is float32, because half-precision parameters stop moving at
the small learning rates of fine-tuning.
"""

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from reweighting.errors import UserError
from reweighting.modeling.config import PRMConfig
from reweighting.modeling.families import family_of, parameters_of

# peft asks transformers by a name that transformers has deprecated.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

ADAPTER_FILE = "adapter_model.safetensors"  # peft's name
PROJECTOR_FILE = "projector.safetensors"  # holds a projector that is trained besides adapters


def add_adapters(base: PreTrainedModel, config: PRMConfig) -> PeftModel:
    """Freeze a backbone and add fresh float32 adapters to its language model.

    Args:
        base: the backbone, changed in place.
        config: `train` is "lora" or "dora"; gives rank and scale.

    Returns:
        The backbone with adapters.
    """
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=cast(int, config.lora_alpha),  # peft takes a float too
        use_dora=config.train == "dora",
        target_modules=family_of(base.config).lora_targets,
    )
    return get_peft_model(base, lora)


def without_adapters(backbone: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model itself.

    Args:
        backbone: it, or what peft has wrapped around it.

    Returns:
        The transformers model; its linear layers keep their adapters.
    """
    return cast(PreTrainedModel, backbone.get_base_model()) if isinstance(backbone, PeftModel) else backbone


def set_trainable(base: PreTrainedModel, config: PRMConfig) -> None:
    """Set which weights of the backbone itself are trained.

    Args:
        base: the backbone, changed in place; its adapters, if any, have been added already.
        config: says what is trained.
    """
    if config.train == "head":
        base.requires_grad_(False)
    elif config.train == "full":
        for parameter in parameters_of(base, family_of(base.config).vision_modules):
            parameter.requires_grad_(config.trains_vision)
    # After the vision tower, because in some families the projector is a part of it.
    for parameter in _projector_parameters(base).values():
        parameter.requires_grad_(config.trains_projector)
        if config.trains_projector:
            parameter.data = parameter.data.float()
    if config.trains_projector and config.dtype != "float32":
        inside = tuple(f"{name}." for name in family_of(base.config).projector_modules)
        for name, module in base.named_modules():
            if f"{name}.".startswith(inside) and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(_cast_inputs)


def _projector_parameters(base: PreTrainedModel) -> dict[str, nn.Parameter]:
    own = {id(parameter) for parameter in parameters_of(base, family_of(base.config).projector_modules)}
    return {name: parameter for name, parameter in base.named_parameters() if id(parameter) in own}


def _cast_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast a module's inputs to the precision of its parameters."""
    dtype = next(module.parameters(recurse=False)).dtype
    return tuple(tensor.to(dtype) for tensor in inputs)


def required_files(config: PRMConfig) -> list[str]:
    """List the files that `save_trained` writes and a complete model must have.

    Args:
        config: of the saved model.

    Returns:
        Names in the model's folder.
    """
    names = [] if config.train == "head" else [ADAPTER_FILE if config.adapted else "config.json"]
    return names + [PROJECTOR_FILE] * (config.adapted and config.trains_projector)


def strip_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the entries of a state dict whose names have a prefix.

    Args:
        weights: a state dict.
        prefix: with its dot, such as "backbone.".

    Returns:
        These entries, by their names without the prefix.
    """
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def save_trained(
    backbone: PreTrainedModel | PeftModel, config: PRMConfig, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write the backbone's weights that cannot be loaded from the base's own place.

    Args:
        backbone: with its adapters, if it has any.
        config: says what is trained.
        folder: an existing folder.
        weights: the backbone's complete state dict, if this process holds only parts of the parameters.
    """
    options: dict[str, Any] = {} if weights is None else {"state_dict": weights}
    if isinstance(backbone, PeftModel):
        # Without this option peft asks the hub whether the vocabulary has grown, with or without a network.
        backbone.save_pretrained(str(folder), save_embedding_layers=False, **options)
        if config.trains_projector:
            base = without_adapters(backbone)
            state = base.state_dict() if weights is None else strip_prefix(weights, "base_model.model.")
            tensors = {name: state[name].cpu() for name in _projector_parameters(base)}
            save_file(tensors, folder / PROJECTOR_FILE)
    elif config.train == "full":
        backbone.save_pretrained(folder, **options)


def load_trained(backbone: PreTrainedModel | PeftModel, config: PRMConfig, folder: Path) -> None:
    """Load the adapters and the projector that `save_trained` wrote besides a frozen base, if it did.

    peft's own loader is not used: the adapters are described by `config`, and nothing in the folder's
    `adapter_config.json`, such as a pattern for the names of modules, is ever used.

    Args:
        backbone: with its adapters, if it has any; changed in place.
        config: settings of the saved model.
        folder: of the saved model.

    Raises:
        ValueError: a file does not fit the backbone.
        RuntimeError: the same.
    """
    if not isinstance(backbone, PeftModel):
        return
    found = set_peft_model_state_dict(backbone, load_file(folder / ADAPTER_FILE))
    different = [*found.unexpected_keys, *(name for name in found.missing_keys if ".lora_" in name)]
    if different:
        raise ValueError(f"{ADAPTER_FILE} does not fit the base: only one of them has {different[0]}")
    if config.trains_projector:
        base = without_adapters(backbone)
        tensors = load_file(folder / PROJECTOR_FILE)
        if different := sorted(tensors.keys() ^ _projector_parameters(base).keys()):
            raise ValueError(f"{PROJECTOR_FILE} does not fit the base: only one of them has {different[0]}")
        base.load_state_dict(tensors, strict=False)


def quantization_config(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> BitsAndBytesConfig:
    """Configure a backbone in 4-bit NormalFloat with double quantization (QLoRA, arXiv 2305.14314).

    Only the language model's linear layers are quantized: vision tower and projector take little memory, and adapters
    on the language model cannot restore what they lose.

    Args:
        config: the backbone's.
        dtype: of the compute.
        device: where the model will be.

    Returns:
        The configuration for `from_pretrained`.

    Raises:
        UserError: a GPU or a package is missing.
    """
    missing = [] if device.type == "cuda" else [f"a CUDA GPU (the device is {device})"]
    if not is_bitsandbytes_available():
        missing.append("the package bitsandbytes (pip install bitsandbytes)")
    if missing:
        raise UserError(f"--load_in_4bit needs {' and '.join(missing)}.")
    family = family_of(config)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*family.vision_modules, *family.projector_modules],
    )
