"""Errors that mean that memory ran out: which they are, and who asked for how much."""

import errno
import re
import traceback

# How allocators report that nothing is left: torch's on the CPU, on CUDA and on MPS; cuBLAS and cuDNN.
MESSAGES = re.compile("out of memory|not enough memory|can(no|')t allocate memory|ALLOC_FAILED", re.I)
# How torch's and numpy's name what they were asked for.
REQUEST = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGTPE]i?B)\b", re.I)
ON_GPU = re.compile("CUDA|CUBLAS|CUDNN|HIP|MPS")
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out: Python, numpy, torch, CUDA and the system each have their own error for it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and MESSAGES.search(str(error)) is not None
    )


def describe_out_of_memory(error: BaseException) -> str:
    """Say in one line which function of this package asked for how much memory.

    Args:
        error: one that `is_out_of_memory`, with its traceback.
    """
    functions = [
        f"{frame.f_globals['__name__'].partition('.')[2]}.{frame.f_code.co_qualname}"
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith("reweighting.")
    ]
    who = functions[-1] if functions else "the command"
    request = REQUEST.search(str(error))
    size = "too much" if request is None else _readable_size(float(request[1]), request[2])
    where = "the GPU" if ON_GPU.search(str(error)) else "main memory"
    return f"out of memory: {size} for {who} did not fit into {where}"


def _readable_size(number: float, unit: str) -> str:
    """A size in the largest unit that leaves at least 1; as it is if it is not in bytes."""
    if unit.lower() != "bytes":
        return f"{number:g} {unit}"
    power = 0
    while number >= 1024 and power < len(UNITS) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.3g} {UNITS[power]}"
