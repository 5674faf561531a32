"""Errors that mean that memory ran out are recognised, and name who asked for how much."""

import errno

import numpy as np
import pytest
import torch

from reweighting.distributed import collectives
from reweighting.out_of_memory import describe_out_of_memory, is_out_of_memory

CPU = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate {} bytes."
CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 3.00 GiB is"
MPS = "MPS backend out of memory (MPS allocated: 1.00 GB, max allowed: 2.00 GB). Tried to allocate 256 bytes"


def raised(ask) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        ask()
    return caught.value


@pytest.mark.parametrize(
    ("error", "size", "where"),
    [
        (lambda: raised(lambda: torch.empty(2**60)), "4 EiB", "main memory"),
        (lambda: raised(lambda: np.zeros(2**56)), "512 PiB", "main memory"),
        (lambda: raised(lambda: bytearray(2**62)), "too much", "main memory"),
        (lambda: torch.OutOfMemoryError(CUDA), "20 GiB", "the GPU"),
        (lambda: RuntimeError(CPU.format(3 * 2**29)), "1.5 GiB", "main memory"),
        (lambda: RuntimeError(MPS), "256 bytes", "the GPU"),
        (lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "too much", "the GPU"),
        (lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), "too much", "main memory"),
    ],
)
def test_who_asked_for_how_much(error, size, where):
    assert is_out_of_memory(error())
    assert describe_out_of_memory(error()) == f"out of memory: {size} for the command did not fit into {where}"


def test_the_innermost_function_of_the_package_is_named():
    class Items:
        def __len__(self):
            raise MemoryError

    error = raised(lambda: collectives.local_slice(Items()))
    assert describe_out_of_memory(error).startswith(
        "out of memory: too much for distributed.collectives.local_slice did"
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "full"), ValueError("out of memory")]
)
def test_other_errors_are_not_of_memory(error):
    assert not is_out_of_memory(error)
