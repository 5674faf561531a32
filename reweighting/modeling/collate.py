"""Pad encoded chains into batches for one pass of the backbone.

Notation: B chains in a batch, Q prompts in a batch, T tokens of the longest text, S steps of the longest chain.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from reweighting.data.chains import Chain
from reweighting.modeling.tokenization import EncodedChain, Pixels


@dataclass(frozen=True)
class Tokens:
    """Hold what the backbone reads in one pass, padded on the right.

    Attributes:
        input_ids: token ids [B, T], int64.
        attention_mask: 1 at tokens, 0 at padding, [B, T] int64.
        is_image: 1 at image tokens, [B, T] int64.
        images: the model's inputs for all images, concatenated along the first axis; empty without images.
        image_features: one tensor [image tokens, ...] for each image, if the features are known; they then replace the
            pixels in `images`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    is_image: Tensor
    images: dict[str, Tensor]
    image_features: tuple[Tensor, ...] | None = None

    @classmethod
    def pad(cls, texts: Sequence[Tensor], is_image: Sequence[Tensor], images: Sequence[Pixels] = ()) -> "Tokens":
        """Pad texts to one length and concatenate their images.

        Args:
            texts: token ids of each text, [T_b] int64.
            is_image: 1 at the image tokens of each text, [T_b] int64.
            images: the images in the order in which they stand in the texts.

        Returns:
            The padded texts, [B, T], with their images.
        """
        lengths = torch.tensor([len(text) for text in texts])
        # Padding repeats each text's last token: it is masked, and it must not be the image token by accident.
        positions = torch.arange(int(lengths.max()))
        padded = [text[positions.clamp(max=len(text) - 1)] for text in texts]
        names = images[0].inputs if images else ()
        features = tuple(image.features for image in images if image.features is not None)
        return cls(
            input_ids=torch.stack(padded),  # [B, T]
            attention_mask=(positions < lengths[:, None]).long(),
            is_image=_pad(is_image),
            images={name: torch.cat([image.inputs[name] for image in images]) for name in names},
            image_features=features or None,  # one tokenizer gives features for all images or for none
        )

    def to(self, device: torch.device | str) -> "Tokens":
        """Copy the tensors to a device.

        Args:
            device: where to.

        Returns:
            The same tokens on `device`.
        """
        moved = _moved(self, device)
        moved["images"] = {name: x.to(device, non_blocking=True) for name, x in self.images.items()}
        if self.image_features is not None:
            moved["image_features"] = tuple(f.to(device, non_blocking=True) for f in self.image_features)
        return replace(self, **moved)


@dataclass(frozen=True)
class Batch:
    """Hold a batch of chains.

    Attributes:
        tokens: the chains, [B, T]; where chains share prompts, only the text after the prompt. None where `states` are
            known.
        prompts: the distinct prompts, [Q, T]; None where nothing is shared.
        prompt_of: each chain's index into `prompts`, [B] int64; None where nothing is shared.
        step_ends: position in `tokens` of each step's last token, [B, S] int64; 0 where there is no step. None where
            `states` are known.
        step_mask: [B, S] bool, True where a step exists.
        targets: Monte Carlo accuracies, [B, S] float32; 0 where there is none.
        target_mask: [B, S] bool, True where a step has a target.
        labels: 1 for a correct final answer, 0 for an incorrect one, NaN if unknown, [B] float32.
        num_labeled_steps: steps with a target in the whole micro-batch, over all processes.
        chains: the chains behind the rows.
        states: the backbone's hidden states at the steps' ends, [B, S, D], 0 where there is no step; None where the
            backbone must compute them from `tokens`.
        chain_ids: the numbers of the chains among all training chains, [B] int64 on the CPU; None for other chains.
    """

    tokens: Tokens | None
    prompts: Tokens | None
    prompt_of: Tensor | None
    step_ends: Tensor | None
    step_mask: Tensor
    targets: Tensor
    target_mask: Tensor
    labels: Tensor
    num_labeled_steps: int
    chains: tuple[Chain, ...]
    states: Tensor | None = None
    chain_ids: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device.

        Args:
            device: where to.

        Returns:
            The same batch on `device`.
        """
        tokens = None if self.tokens is None else self.tokens.to(device)
        prompts = None if self.prompts is None else self.prompts.to(device)
        return replace(self, tokens=tokens, prompts=prompts, **_moved(self, device))


def collate(encoded: Sequence[EncodedChain], share_prompts: bool = False) -> Batch:
    """Collate encoded chains, with and without images, into one batch.

    Args:
        encoded: the chains, at least one.
        share_prompts: the model can continue several chains from one pass over their prompt. Prompts are then separated
            if at least a quarter of them are repetitions.

    Returns:
        The batch, on the CPU.
    """
    chains = [item.chain for item in encoded]
    index_of: dict[Hashable, int] = {}  # distinct prompt -> its index
    prompt_of = [index_of.setdefault(_prompt_key(item), len(index_of)) for item in encoded]
    prompts = None
    if share_prompts and 4 * len(index_of) <= 3 * len(encoded):
        first = [encoded[prompt_of.index(index)] for index in range(len(index_of))]
        prompts = Tokens.pad(
            [item.input_ids[: item.prompt_length] for item in first],
            [item.is_image[: item.prompt_length] for item in first],
            [image for item in first for image in item.images],
        )
    starts = [0 if prompts is None else item.prompt_length for item in encoded]  # of each chain's own text
    tokens = Tokens.pad(
        [item.input_ids[start:] for item, start in zip(encoded, starts, strict=True)],
        [item.is_image[start:] for item, start in zip(encoded, starts, strict=True)],
        [image for item in encoded for image in item.images] if prompts is None else (),
    )
    return Batch(
        tokens=tokens,
        prompts=prompts,
        prompt_of=None if prompts is None else torch.tensor(prompt_of),
        step_ends=_pad([item.step_ends - start for item, start in zip(encoded, starts, strict=True)]),  # [B, S]
        **_supervision(chains),
    )


def collate_states(chains: Sequence[Chain], states: Sequence[Tensor]) -> Batch:
    """Collate chains whose hidden states are known into one batch.

    Args:
        chains: the chains, at least one.
        states: of the backbone at each chain's steps' ends, [S_b, D].

    Returns:
        The batch, on the CPU.
    """
    return Batch(None, None, None, None, states=_pad(states), **_supervision(chains))


def _supervision(chains: Sequence[Chain]) -> dict[str, Any]:
    """The fields of a `Batch` that do not depend on how the backbone reads the chains."""
    step_counts = torch.tensor([len(chain.steps) for chain in chains])  # [B]
    targets = _pad([torch.tensor(c.targets or [math.nan] * len(c.steps)) for c in chains], math.nan)  # [B, S]
    return {
        "step_mask": torch.arange(int(step_counts.max())) < step_counts[:, None],  # [B, S]
        "targets": targets.nan_to_num(nan=0.0),
        "target_mask": ~targets.isnan(),
        "labels": torch.tensor([chain.label for chain in chains]),
        "num_labeled_steps": sum(chain.num_labeled_steps for chain in chains),
        "chains": tuple(chains),
    }


def sort_by_length(encoded: Sequence[EncodedChain]) -> list[EncodedChain]:
    """Sort chains so that neighbors have similar lengths and need little padding.

    Args:
        encoded: the chains.

    Returns:
        The chains by the longest chain of their prompt; chains of one prompt stay together.
    """
    longest: dict[Hashable, int] = {}
    for item in encoded:
        key = item.chain.prompt
        longest[key] = max(longest.get(key, 0), len(item.input_ids))
    order = {key: number for number, key in enumerate(longest)}
    return sorted(encoded, key=lambda item: (longest[item.chain.prompt], order[item.chain.prompt]))


def _prompt_key(item: EncodedChain) -> Hashable:
    """Return what chains of one prompt have in common. Images that are no files are identified by their objects."""
    return (item.chain.prompt, () if item.chain.images else tuple(map(id, item.images)))


def _pad(rows: Sequence[Tensor], value: float = 0) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _moved(holder: Tokens | Batch, device: torch.device | str) -> dict[str, Any]:
    """Copy the tensors among a dataclass's fields to a device."""
    tensors = {field.name: getattr(holder, field.name) for field in fields(holder)}
    return {name: v.to(device, non_blocking=True) for name, v in tensors.items() if isinstance(v, Tensor)}
