"""How much memory a computation would take, without making it: on tensors that have shapes and no numbers.

    with torch.device("meta"):
        model = ...
    model = on_shapes(model)                         # every tensor is torch's FakeTensor: no memory, no weights
    saved, peak = step_memory(lambda: loss(model, batch), list(model.parameters()))

Every operation of the forward and backward pass runs on shapes alone, and every result counts from where it is made to
where the last reference to it goes: what autograd saves, what gradient checkpointing frees and makes again, copies
in another precision, temporary results. Inputs may be real tensors, so that a model may look at token ids.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


def step_memory(
    loss: Callable[[], Tensor], params: Sequence[nn.Parameter], known: Iterable[Tensor], parts: int = 1
) -> tuple[int, int]:
    """Bytes that a forward pass leaves behind for the backward pass, and the most that both have at a time, the
    gradients of `params` included. known: tensors that are there anyway (weights, inputs). parts: that a gradient is
    cut into as soon as it is made, of which one is kept."""
    # Not a TorchFunctionMode: it is off while checkpointed activations are computed anew.
    fused = patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused_attention)
    with fused, LiveMemory(known) as live:
        value = loss()
        saved = live.now
        if parts == 1:
            grads = torch.autograd.grad(value, list(params), allow_unused=True, materialize_grads=True)
        else:
            grads = _backward_into_parts(value, params, parts)
        del value, grads
    return saved, live.peak


def _backward_into_parts(loss: Tensor, params: Sequence[nn.Parameter], parts: int) -> list[Tensor]:
    kept = []

    def keep_own(param: nn.Parameter) -> None:
        kept.append(param.grad.new_empty(-(-param.numel() // parts)))
        param.grad = None

    hooks = [param.register_post_accumulate_grad_hook(keep_own) for param in params]
    loss.backward()
    for hook in hooks:
        hook.remove()
    return kept


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are still referenced: `now`, and their `peak`."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}  # storage -> its bytes
        self._known = [tensor.untyped_storage() for tensor in known]
        self._sizes |= {storage._cdata: 0 for storage in self._known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in INDEXING:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
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


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """An index; in the place of a mask that has numbers, where it is true: a shape may depend on how often it is."""
    is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero(as_tuple=True) if is_mask else (index,)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args, **kwargs) -> Tensor:
    """Stands in for torch's: takes the memory of a fused kernel (flash, memory-efficient), where tensors without
    numbers would go the way of plain arithmetic, which keeps matrices of T x T for every head."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (q, k, v))
    if attn_mask is not None:  # the kernels want it in numbers
        attn_mask = q.new_empty(attn_mask.shape)
    return _Attention.apply(q, k, v, attn_mask)


class _Attention(torch.autograd.Function):
    """The shapes of fused attention, forward and backward: it saves its inputs, its output and a number a query."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        *outer, heads, queries, _ = q.shape
        out = q.new_empty((*outer, queries, heads, v.shape[-1])).transpose(-2, -3)  # as the kernels lay it out
        normalizers = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, normalizers, mask)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None)
