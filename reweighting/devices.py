"""Where a model computes, and how exactly."""

import torch
from transformers.utils import is_flash_attn_2_available

from reweighting.distributed.rank0_output import dist_env
from reweighting.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The named device, or the best that is there; of several processes, each one's own GPU. Raises UserError if it is
    not there."""
    _, world, local = dist_env()
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator else "cpu"
    if world > 1 and name == "cuda":
        name = f"cuda:{local}"
    elif world > 1 and name != "cpu":
        raise UserError(f"--device {name}: several processes compute on cuda (each on a GPU of its own) or on cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UserError("--device meta: nothing can be computed there")
    return device


def choose_precision(name: str | None, device: torch.device) -> str:
    """The named precision, or bf16 on a GPU of CUDA and fp32 elsewhere."""
    return name or ("bf16" if device.type == "cuda" else "fp32")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which `bf16` computes in bfloat16 where that is safe, and `fp32` as it is."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def check_attention(name: str, device: torch.device, precision: str) -> None:
    """Raise UserError, saying what is missing, if attention cannot be computed this way there."""
    if name != "flash_attention_2":
        return
    missing = [] if device.type == "cuda" else [f"a CUDA GPU (the device is {device})"]
    if precision != "bf16":
        missing.append(f"--precision bf16 (it is {precision})")
    if not is_flash_attn_2_available():
        missing.append("the package flash-attn, 2.3.3 or newer (pip install flash-attn)")
    if missing:
        raise UserError(f"--attention {name} needs {' and '.join(missing)}; --attention sdpa does without")
