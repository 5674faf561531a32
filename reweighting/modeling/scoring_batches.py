"""Score many chains with a reward model, those of like length together, in evaluation mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reweighting.data.chains import Chain
from reweighting.modeling.tokenization import Pixels

if TYPE_CHECKING:
    from reweighting.modeling.reward_model import ProcessRewardModel


def score_in_batches(
    model: ProcessRewardModel, chains: Sequence[Chain], batch_size: int, images: Sequence[Pixels] | None
) -> tuple[Tensor, Tensor]:
    """Compute step logits without gradients, in batches of chains that need little padding.

    The model is in evaluation mode meanwhile; no other thread may use it.

    Args:
        model: the reward model.
        chains: N chains with at most S steps.
        batch_size: chains in a forward pass.
        images: replace each chain's own, if they are not files.

    Returns:
        Step logits [N, S] and step mask [N, S] bool, on the CPU.

    Raises:
        UserError: as `ChainTokenizer.encode`.
    """
    tokenizer = model.chain_tokenizer
    if tokenizer.encode_image is None and model.holds_full_parameters:
        tokenizer = tokenizer.with_image_encoder(model.encode_image)
    if images is not None:
        images = [tokenizer.with_features(image) for image in images]
    steps = max((len(chain.steps) for chain in chains), default=0)
    # Made outside inference mode, so that the caller can compute with them in any way.
    logits, mask = torch.zeros(len(chains), steps), torch.zeros(len(chains), steps, dtype=torch.bool)  # [N, S]
    was_training = model.training
    model.eval()
    try:
        # Sharded layers could not be trained with tensors that they gather in inference mode.
        with torch.inference_mode() if model.holds_full_parameters else torch.no_grad():
            order = by_length(chains)
            for start in range(0, len(chains), batch_size):
                places = order[start : start + batch_size]
                part = [chains[place] for place in places]
                if model.step_states is not None and images is None:
                    batch = model.make_batch(part)
                else:
                    batch = model.collate([tokenizer.encode(chain, images) for chain in part])
                z = model(batch)  # [B, S of the batch]
                logits[places, : z.shape[1]] = z.cpu()
                mask[places, : z.shape[1]] = batch.step_mask.cpu()
    finally:
        model.train(was_training)
    return logits, mask


def by_length(chains: Sequence[Chain]) -> list[int]:
    """Return the positions of chains in an order whose neighbors are of like length: batches then need little padding.

    Chains with the same images, or the same question where there are none, stay together: neighbors share the images'
    features and the pass over the prompt.
    """
    lengths = [len(chain.question) + sum(map(len, chain.steps)) for chain in chains]
    groups = [str(chain.images or chain.question) for chain in chains]
    longest: dict[str, int] = {}
    for group, length in zip(groups, lengths, strict=True):
        longest[group] = max(length, longest.get(group, 0))
    return sorted(range(len(chains)), key=lambda i: (longest[groups[i]], groups[i], chains[i].question, lengths[i]))
