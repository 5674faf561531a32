"""Attention of many texts that continue few beginnings, over one copy of the keys and values of each beginning.

    model.set_attn_implementation(SHARED_ATTENTION)
    model(input_ids=last_tokens, past_key_values=own_tokens, beginnings=Beginnings([layers], [16], windows), ...)

Without `beginnings`, the model attends as with transformers' "sdpa".

Notation: B texts, T own tokens of the longest one, L tokens of the longest beginning, K key heads with G query heads
each, D numbers a head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHARED_ATTENTION = "shared_beginnings"
Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [B, K, T, D]


@dataclass(frozen=True)
class Beginnings:
    """What the texts of a batch continue.

    Attributes:
        layers: keys and values of each beginning, with B = 1.
        texts: how many continue each; they are neighbours in the batch.
        windows: of each layer: how many tokens a query reaches, its own included; None: all.
    """

    layers: Sequence[Layers]
    texts: Sequence[int]
    windows: Sequence[int | None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    beginnings: Beginnings | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend from one new token of each text; for transformers' `AttentionInterface`.

    Args:
        module: the layer's attention, with `layer_idx`.
        query: [B, K * G, 1, D].
        key, value: of the own tokens, [B, K, T, D].
        attention_mask: which own tokens are there and in reach, [B, 1, 1, T]; None: all.
        beginnings: what stands before the own tokens; None: nothing.
        options: see transformers' `sdpa_attention_forward`.

    Returns:
        [B, 1, K * G, D], and None.
    """
    if beginnings is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    batch, heads, _, size = query.shape
    layer = cast(int, module.layer_idx)
    query = query.reshape(batch, key.shape[1], -1, size) * (options.get("scaling") or 1 / math.sqrt(size))
    if attention_mask is None:
        attention_mask = query.new_ones(batch, 1, 1, key.shape[2], dtype=torch.bool)
    held = [layers[layer] for layers in beginnings.layers]  # keys and values, [1, K, its tokens, D]
    ends = list(accumulate(beginnings.texts))
    rows = [slice(end - texts, end) for end, texts in zip(ends, beginnings.texts, strict=True)]
    longest = max(keys.shape[2] for keys, _ in held)
    columns = [slice(longest - keys.shape[2], longest) for keys, _ in held]  # aligned at their last tokens

    scores = query.new_full((*query.shape[:3], longest + key.shape[2]), -torch.inf)  # [B, K, G, L + T]
    scores[..., longest:] = (query @ key.mT).masked_fill(~attention_mask, -torch.inf)
    for row, column, (keys, _) in zip(rows, columns, held, strict=True):
        scores[row, :, :, column] = torch.einsum("bkgd,kld->bkgl", query[row], keys[0])
    if (window := beginnings.windows[layer]) is not None:
        distances = torch.arange(longest, 0, -1, device=query.device)  # from a text's first token, [L]
        own_tokens = attention_mask.sum(-1, keepdim=True)  # [B, 1, 1, 1]
        scores[..., :longest].masked_fill_(distances + own_tokens > window, -torch.inf)
    weights = scores.softmax(-1, torch.float32).to(value.dtype)
    outputs = weights[..., longest:] @ value  # [B, K, G, D]
    for row, column, (_, values) in zip(rows, columns, held, strict=True):
        outputs[row] += torch.einsum("bkgl,kld->bkgd", weights[row, :, :, column], values[0])
    return outputs.reshape(batch, 1, heads, -1), None


AttentionInterface.register(SHARED_ATTENTION, attend)
AttentionMaskInterface.register(SHARED_ATTENTION, sdpa_mask)
