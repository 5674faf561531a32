"""The device that a model computes on, and the precision."""

import torch
from accelerate.utils import parse_flag_from_env
from transformers.utils import is_flash_attn_2_available

from reweighting.distributed.rank0_output import dist_env
from reweighting.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """Choose where this process computes.

    Args:
        name: a device of torch; None for the best available, or the CPU under `accelerate launch --cpu`.

    Returns:
        The device; of several processes on CUDA, each one's own GPU, which `PartialState` takes too.

    Raises:
        UserError: if the device is not there, or several processes cannot compute on it.
    """
    _, world, local_rank = dist_env()
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = "cpu" if accelerator is None or parse_flag_from_env("ACCELERATE_USE_CPU") else accelerator.type
    if world > 1 and name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: several processes compute on cuda (each on a GPU of its own) or on cpu")
    if world > 1 and name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UserError("--device meta: nothing can be computed there")
    return device


def choose_precision(name: str | None, device: torch.device) -> str:
    """Return the named precision; without a name, bf16 on CUDA and fp32 elsewhere."""
    return name or ("bf16" if device.type == "cuda" else "fp32")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which `bf16` computes in bfloat16 where that is safe, and `fp32` in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def check_attention(name: str, device: torch.device, precision: str) -> None:
    """Check that attention can be computed this way.

    Args:
        name: an attention implementation of transformers.
        device: where the model computes.
        precision: bf16 or fp32.

    Raises:
        UserError: if something is missing; names it.
    """
    if name != "flash_attention_2":
        return
    missing = [] if device.type == "cuda" else [f"a CUDA GPU (the device is {device})"]
    if precision != "bf16":
        missing.append(f"--precision bf16 (it is {precision})")
    if not is_flash_attn_2_available():
        missing.append("the package flash-attn, 2.3.3 or newer (pip install flash-attn)")
    if missing:
        raise UserError(f"--attention {name} needs {' and '.join(missing)}; --attention sdpa does without")
