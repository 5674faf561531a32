"""How much memory a computation would take, on tensors that have shapes and no numbers.

    with torch.device("meta"):
        model = ...
    model = on_shapes(model)                         # every tensor is torch's FakeTensor: no memory, no weights
    activations, peak = step_memory(lambda: loss(model, batch), list(model.parameters()), known)

Every operation of the forward and backward pass runs on shapes alone. A result counts from the operation that makes it
until its last reference is gone: what autograd saves, what gradient checkpointing frees and computes again, copies in
another precision, temporary results. Inputs may be real tensors, so that a model may look at token ids.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


def step_memory(
    loss: Callable[[], Tensor], params: Sequence[nn.Parameter], known: Iterable[Tensor], shards: int = 1
) -> tuple[int, int]:
    """Count the memory of a forward and a backward pass.

    Args:
        loss: Computes a scalar.
        params: Parameters to differentiate with respect to.
        known: Tensors that exist anyway (weights, inputs) and do not count.
        shards: A gradient is cut into so many as soon as it is made, of which one stays.

    Returns:
        Bytes that the forward pass leaves for the backward pass, and the most that exist at a time in both, the
        gradients included.
    """
    with _fused_kernels(), LiveMemory(known) as live:
        value = loss()
        activations = live.now
        if shards == 1:
            grads = list(torch.autograd.grad(value, list(params), allow_unused=True, materialize_grads=True))
        else:
            grads = _backward_into_shards(value, params, shards)
        del value, grads
    return activations, live.peak


def forward_memory(compute: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Return the most bytes that exist at a time in a computation, without those of `known`."""
    with _fused_kernels(), LiveMemory(known) as live:
        compute()
    return live.peak


def _fused_kernels() -> Any:
    # Not a TorchFunctionMode: it is off while checkpointed activations are computed again.
    return patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused_attention)


def _backward_into_shards(loss: Tensor, params: Sequence[nn.Parameter], shards: int) -> list[Tensor]:
    """One shard of each gradient; the rest of it is freed as soon as it is made."""
    kept: list[Tensor] = []

    def keep_shard(param: Tensor) -> None:
        if param.grad is not None:
            kept.append(param.grad.new_empty(-(-param.numel() // shards)))
        param.grad = None

    hooks = [param.register_post_accumulate_grad_hook(keep_shard) for param in params]
    loss.backward()
    for hook in hooks:
        hook.remove()
    return kept


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is entered that are still referenced.

    Args:
        known: Tensors that do not count.

    Attributes:
        now: Bytes at this moment.
        peak: The most so far.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # kept alive, so that no address is used again
        self._sizes = {storage._cdata: 0 for storage in self._known}  # storage -> its bytes

    def __torch_dispatch__(self, func, types, args: tuple[Any, ...] = (), kwargs=None) -> Any:
        if func in INDEXING:
            tensor, indices, *rest = args
            args = (tensor, [part for index in indices for part in _as_integers(index)], *rest)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _as_integers(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """An index as it is; a mask with numbers as the indices where it is true, whose count a shape may depend on."""
    is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero(as_tuple=True) if is_mask else (index,)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args, **kwargs) -> Tensor:
    """Stands in for torch's attention with the memory of a fused kernel (flash, memory-efficient).

    On tensors without numbers torch would compute it by plain arithmetic, which keeps a T x T matrix for every head.
    """
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (q, k, v))
    if attn_mask is not None:  # the kernels take it as numbers to add
        attn_mask = q.new_empty(attn_mask.shape)
    return _Attention.apply(q, k, v, attn_mask)


class _Attention(torch.autograd.Function):
    """The shapes of fused attention: it saves its inputs, its output and a number for each query."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q)[..., : v.shape[-1]]  # in the queries' memory layout, as the kernels make it
        normalizers = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, normalizers, mask)
        return out

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (*(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None)
