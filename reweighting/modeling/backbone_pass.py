"""Run the backbone over a batch, with each prompt that several chains share read only once."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from reweighting.modeling.collate import Batch, Tokens
from reweighting.modeling.families import Family


def states_at_ends(backbone: nn.Module, base: PreTrainedModel, family: Family, batch: Batch) -> Tensor:
    """Compute the last hidden states at the steps' ends. Gradients flow through both passes where prompts are shared.

    Args:
        backbone: what is run: the transformers model, with its adapters if it has any.
        base: the transformers model itself.
        family: names the model's inputs.
        batch: B chains as tokens, with at most S steps.

    Returns:
        Hidden states [B, S, D]; anything where there is no step.

    Raises:
        ValueError: the batch holds no tokens.
    """
    if batch.tokens is None or batch.step_ends is None:
        raise ValueError("expected a batch with tokens")
    hidden = _hidden_states(backbone, base, family, batch.tokens, batch.prompts, batch.prompt_of)  # [B, T, D]
    ends = batch.step_ends[:, :, None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, ends)  # [B, S, D]


def _hidden_states(
    backbone: nn.Module,
    base: PreTrainedModel,
    family: Family,
    tokens: Tokens,
    prompts: Tokens | None,
    prompt_of: Tensor | None,
) -> Tensor:
    """The last hidden states [B, T, D]; T counts only the text after the prompt where prompts are shared."""
    if prompts is None or prompt_of is None:
        return _run(backbone, family, tokens, use_cache=False)
    positions, next_position = _positions(base, family, prompts)
    cache = DynamicCache()
    _run(backbone, family, prompts, position_ids=positions, past_key_values=cache, use_cache=True)
    cache.batch_select_indices(prompt_of)
    length = tokens.input_ids.shape[1]
    mask = torch.cat([prompts.attention_mask[prompt_of], tokens.attention_mask], dim=1)  # [B, T prompt + T]
    after = next_position[prompt_of, None] + torch.arange(length, device=next_position.device)  # [B, T]
    extended = replace(tokens, attention_mask=mask)
    return _run(backbone, family, extended, position_ids=after, past_key_values=cache, use_cache=True)


def _run(backbone: nn.Module, family: Family, tokens: Tokens, **options: Any) -> Tensor:
    """Run the backbone once: hidden states [B, T, D]."""
    return backbone(**family.model_inputs(tokens), **options).last_hidden_state


def _positions(base: PreTrainedModel, family: Family, prompts: Tokens) -> tuple[Tensor, Tensor]:
    """Compute the position ids of prompts, [Q, T] or [3, Q, T], and of the first token after each, [Q]."""
    mask = prompts.attention_mask
    positions = family.position_ids(base, family.model_inputs(prompts))
    if positions is None:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    return positions, positions.masked_fill(mask == 0, 0).amax(-1).view(-1, len(mask)).amax(0) + 1
