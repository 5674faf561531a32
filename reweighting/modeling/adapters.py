"""What of a backbone is trained, how the frozen rest is kept small, and what is saved of it. See `modeling/config.py`.

A frozen base may be bfloat16 or 4-bit; what is trained is float32 always, since at the small learning rates of
fine-tuning half-precision parameters stop moving.
"""

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from reweighting.errors import UserError
from reweighting.modeling.config import PRMConfig
from reweighting.modeling.families import family_of, parameters_of

# peft asks transformers by a name that transformers tells everyone to stop using.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

ADAPTER_FILE = "adapter_model.safetensors"  # peft's name
PROJECTOR_FILE = "projector.safetensors"  # where a projector is trained beside adapters


def add_adapters(base: nn.Module, config: PRMConfig) -> PeftModel:
    """The base, frozen, with fresh float32 adapters on its language model."""
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        use_dora=config.train == "dora",
        target_modules=family_of(base.config).lora_targets,
    )
    return get_peft_model(base, lora)


def choose_trained(base: nn.Module, config: PRMConfig) -> None:
    """Set which weights of the base itself are trained; call it once adapters are on."""
    if config.train == "head":
        base.requires_grad_(False)
    elif config.train == "full":
        for parameter in parameters_of(base, family_of(base.config).vision_modules):
            parameter.requires_grad_(config.trains_vision)
    # After the tower: in some families the projector is a part of it.
    for parameter in _projector(base).values():
        parameter.requires_grad_(config.trains_projector)
        if config.trains_projector:
            parameter.data = parameter.data.float()
    if config.trains_projector and config.dtype != "float32":
        inside = tuple(f"{name}." for name in family_of(base.config).projector_modules)
        for name, module in base.named_modules():
            if f"{name}.".startswith(inside) and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(_to_own_dtype)


def _projector(base: nn.Module) -> dict[str, nn.Parameter]:
    own = {id(parameter) for parameter in parameters_of(base, family_of(base.config).projector_modules)}
    return {name: parameter for name, parameter in base.named_parameters() if id(parameter) in own}


def _to_own_dtype(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    dtype = next(module.parameters(recurse=False)).dtype
    return tuple(tensor.to(dtype) for tensor in inputs)


def saved_files(config: PRMConfig) -> list[str]:
    """The files that `save_trained` must have left, for a model to be whole."""
    names = [] if config.train == "head" else [ADAPTER_FILE if config.adapted else "config.json"]
    return names + [PROJECTOR_FILE] * (config.adapted and config.trains_projector)


def strip_prefix(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries of a state dict whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def save_trained(
    backbone: nn.Module, config: PRMConfig, folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write what cannot be loaded from the base's own place into `folder`.

    weights: the backbone's whole state dict, where this process holds only parts of the parameters.
    """
    options = {} if weights is None else {"state_dict": weights}
    if config.train == "full":
        backbone.save_pretrained(folder, **options)
    if config.adapted:
        # Without the option peft asks the hub whether the vocabulary has grown, network or not.
        backbone.save_pretrained(folder, save_embedding_layers=False, **options)
        if config.trains_projector:
            base = backbone.get_base_model()
            whole = base.state_dict() if weights is None else strip_prefix(weights, "base_model.model.")
            tensors = {name: whole[name].cpu() for name in _projector(base)}
            save_file(tensors, folder / PROJECTOR_FILE)


def load_projector(base: nn.Module, config: PRMConfig, folder: Path) -> None:
    """Set the projector to what `save_trained` wrote beside adapters. Raises ValueError if it does not fit the base."""
    if config.adapted and config.trains_projector:
        tensors = load_file(folder / PROJECTOR_FILE)
        if different := sorted(tensors.keys() ^ _projector(base).keys()):
            raise ValueError(f"{PROJECTOR_FILE} is not of this base: {different[0]} is in one of them only")
        base.load_state_dict(tensors, strict=False)


def four_bit(config, dtype: torch.dtype, device: torch.device) -> BitsAndBytesConfig:
    """How a backbone with this config is loaded in 4-bit NormalFloat with double quantisation, computing in `dtype`.

    Only the language model's linear layers are quantised: tower and projector are a small part of the memory, and what
    they lose no adapter gives back. Raises UserError, saying what is missing, where it is not possible.
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
