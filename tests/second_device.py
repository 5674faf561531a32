"""A second device beside the CPU, for machines that have none: tensors on it compute on the CPU, but refuse to meet
tensors that are not there, as those on a GPU do.

    install()                      # for the whole process: call it in one of its own
    with SecondDevice():
        torch.zeros(3, device="second") + torch.zeros(3)      # raises Apart

It stands for what device a tensor is on, and for nothing else of a GPU: no streams, no kernels, no precision.
"""

from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "second"
ops = torch.ops.aten
MOVES = {ops._to_copy.default, ops.to.device, ops.copy_.default}
# Indices, the second argument, are taken from the CPU everywhere.
INDEXING = {ops.index.Tensor, ops.index_put.default, ops.index_put_.default, ops._index_put_impl_.default}


class Apart(RuntimeError):
    """Tensors of both devices meet."""


class _Module(backend_registration._DummyBackendModule):
    """What `torch.second` has to answer."""

    def get_rng_state(self, device=0) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device=0) -> None:
        """Random numbers come from the CPU's generator."""

    def manual_seed(self, seed: int) -> None:
        """As above."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def install() -> None:
    """Make the device known to torch."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())


class SecondTensor(Tensor):
    """A tensor on the second device. inner: the same on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __repr__(self) -> str:
        return f"{NAME}: {self.inner}"

    def tolist(self) -> list:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """The context in which tensors can be made on the second device."""

    def __enter__(self):
        # torch.tensor makes its tensors out of sight of modes.
        made, taken, saved = torch.tensor, torch.as_tensor, torch.save

        def make(data, *, device=None, **more) -> Tensor:
            return _moved(made(_plain(data), **more), device)

        def take(data, dtype=None, device=None) -> Tensor:
            return _moved(taken(data, dtype), device)

        def save(data, *args, **more) -> None:  # what is read again is wanted on the CPU first
            saved(tree_map(_inner, data), *args, **more)

        now = {"tensor": make, "as_tensor": take, "save": save}
        self._patches = [patch.object(torch, name, function) for name, function in now.items()]
        for one in self._patches:
            one.start()
        return super().__enter__()

    def __exit__(self, *error):
        for one in self._patches:
            one.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _moved(tensor: Tensor, device) -> Tensor:
    return tensor if device is None else tensor.to(device)


def _plain(data):
    """Numbers in the place of the tensors in a nested list."""
    return tree_map(lambda x: x.item() if isinstance(x, SecondTensor) else x, data)


def _compute(func, args: tuple, kwargs: dict):
    """One operation, on the CPU; its result is on the second device if that is asked for, or its arguments are."""
    leaves = tree_leaves((args, kwargs))
    here = [leaf for leaf in leaves if isinstance(leaf, SecondTensor)]
    together = tree_leaves((args[0], args[2:])) if func in INDEXING else leaves
    elsewhere = [x for x in together if isinstance(x, Tensor) and x.dim() > 0 and not isinstance(x, SecondTensor)]
    if here and elsewhere and func not in MOVES:
        raise Apart(f"{func}: {[tuple(tensor.shape) for tensor in elsewhere]} on the CPU, others on {NAME}")
    asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    is_here = asked[0].type == NAME if asked else bool(here)
    if func is ops.copy_.default:
        _inner(args[0]).copy_(_inner(args[1]))
        return args[0]
    outer = {id(tensor.inner): tensor for tensor in here}  # an operation in place gives its argument back
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    return tree_map(lambda x: outer.get(id(x), _wrapped(x)) if is_here else x, result)


def _inner(value):
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.inner if isinstance(value, SecondTensor) else value


def _wrapped(value):
    return SecondTensor(value) if isinstance(value, Tensor) else value
