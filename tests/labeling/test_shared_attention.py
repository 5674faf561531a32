"""Attention over one copy of each beginning, against transformers' own over a copy for each text."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from reweighting.labeling.shared_attention import Beginnings, attend

HEADS, GROUPS, SIZE, VALUE_SIZE = 2, 3, 8, 5
LENGTHS, TEXTS, OWN = (
    (9, 4, 1),
    (3, 1, 2),
    (5, 2, 1, 1, 4, 3),
)  # tokens and texts of the beginnings, tokens of the texts


@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
def test_attention_is_that_over_a_copy_for_each_text(window):
    torch.manual_seed(0)
    layers = [[(torch.randn(1, HEADS, n, SIZE), torch.randn(1, HEADS, n, VALUE_SIZE))] for n in LENGTHS]
    longest, batch = max(OWN), len(OWN)
    query = torch.randn(batch, HEADS * GROUPS, 1, SIZE)
    key, value = torch.randn(batch, HEADS, longest, SIZE), torch.randn(batch, HEADS, longest, VALUE_SIZE)
    ages = torch.arange(longest - 1, -1, -1)
    mask = (ages < torch.tensor(OWN)[:, None]) & (ages < (window or longest))
    module = nn.Module()
    module.layer_idx, module.num_key_value_groups = 0, GROUPS
    beginnings = Beginnings(layers, TEXTS, [window])
    found, _ = attend(module, query, key, value, mask[:, None, None], beginnings, scaling=0.3)
    rows = [keys_values for (keys_values,), texts in zip(layers, TEXTS, strict=True) for _ in range(texts)]
    for row, ((keys, values), own) in enumerate(zip(rows, OWN, strict=True)):
        whole = [torch.cat([old, new[row : row + 1, :, -own:]], 2) for old, new in ((keys, key), (values, value))]
        seen = torch.arange(whole[0].shape[2] - 1, -1, -1) < (window or 100)
        expected, _ = sdpa_attention_forward(module, query[row : row + 1], *whole, seen[None, None, None], scaling=0.3)
        torch.testing.assert_close(found[row : row + 1], expected)


def test_texts_of_equal_length_need_no_mask():
    module = nn.Module()
    module.layer_idx, module.num_key_value_groups = 0, 1
    query, key, value = torch.randn(3, 2, 4, 1, SIZE).unbind()
    keys, values = torch.randn(2, 1, 4, 6, SIZE).unbind()
    found, _ = attend(module, query, key, value, None, Beginnings([[(keys, values)]], [2], [None]))
    whole = [torch.cat([old.expand(2, -1, -1, -1), new], 2) for old, new in ((keys, key), (values, value))]
    expected, _ = sdpa_attention_forward(module, query, *whole, None)
    torch.testing.assert_close(found, expected)
