"""Batches: encoded chains, padded and put together for one pass of the backbone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from reweighting.data.chains import Chain
from reweighting.modeling.tokenization import EncodedChain, Pixels


@dataclass(frozen=True)
class Tokens:
    """What the backbone reads in one pass, padded on the right.

    input_ids, attention_mask, is_image (1 at image tokens): [B, T] int64.
    images: the model's inputs for all images, one image after the other; empty where there is none.
    image_features: one [image tokens, …] for each image, in place of its pixels, where they are known; else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    is_image: Tensor
    images: dict[str, Tensor]
    image_features: tuple[Tensor, ...] | None = None

    @classmethod
    def pad(cls, texts: Sequence[Tensor], is_image: Sequence[Tensor], images: Sequence[Pixels] = ()) -> "Tokens":
        """Put texts and their images together."""
        lengths = torch.tensor([len(text) for text in texts])
        # Padding repeats each text's last token: masked anyway, and never by accident the image token.
        positions = torch.arange(int(lengths.max()))
        padded = [text[positions.clamp(max=len(text) - 1)] for text in texts]
        names = images[0].inputs if images else ()
        known = bool(images) and images[0].features is not None  # of one tokenizer all are, or none is
        return cls(
            input_ids=torch.stack(padded),
            attention_mask=(positions < lengths[:, None]).long(),
            is_image=_pad(is_image),
            images={name: torch.cat([image.inputs[name] for image in images]) for name in names},
            image_features=tuple(image.features for image in images) if known else None,
        )

    def to(self, device) -> "Tokens":
        """The same on `device`."""
        moved = _moved(self, device)
        moved["images"] = {name: x.to(device, non_blocking=True) for name, x in self.images.items()}
        if self.image_features is not None:
            moved["image_features"] = tuple(f.to(device, non_blocking=True) for f in self.image_features)
        return replace(self, **moved)


@dataclass(frozen=True)
class Batch:
    """Chains of a batch.

    tokens: the chains [B, T]; or, where they share prompts, what follows these.
    prompts [Q, T] and prompt_of [B]: the prompts, and each chain's; None where nothing is shared.
    step_ends [B, S] int64: position in `tokens` of a step's last token (0 where there is no step); step_mask [B, S]
    bool: the step exists.
    targets [B, S] float32 (0 where there is none) and target_mask [B, S] bool: the step has a label.
    labels [B] float32: 1 / 0 for a right / wrong final answer, NaN if unknown.
    num_labeled_steps: how many steps have a label, in all processes' shares of a micro-batch together. chains: where
    all of it comes from.
    """

    tokens: Tokens
    prompts: Tokens | None
    prompt_of: Tensor | None
    step_ends: Tensor
    step_mask: Tensor
    targets: Tensor
    target_mask: Tensor
    labels: Tensor
    num_labeled_steps: int
    chains: tuple[Chain, ...]

    def to(self, device) -> "Batch":
        """The same batch on `device`."""
        prompts = None if self.prompts is None else self.prompts.to(device)
        return replace(self, tokens=self.tokens.to(device), prompts=prompts, **_moved(self, device))


def collate(encoded: Sequence[EncodedChain], share_prompts: bool = False) -> Batch:
    """Put encoded chains, with and without images, into one batch.

    share_prompts: the model can go on from a prompt that it has read once, so where a quarter of the prompts or more
    are repeated, they are put aside.
    """
    chains = [item.chain for item in encoded]
    number: dict = {}  # prompt -> its place among the different ones
    prompt_of = [number.setdefault(_prompt_key(item), len(number)) for item in encoded]
    prompts = None
    if share_prompts and 4 * len(number) <= 3 * len(encoded):
        first = [encoded[prompt_of.index(place)] for place in range(len(number))]
        prompts = Tokens.pad(
            [item.input_ids[: item.prompt_length] for item in first],
            [item.is_image[: item.prompt_length] for item in first],
            [item.pixels for item in first if item.pixels is not None],
        )
    # Where the text begins that this chain has for itself.
    begins = [0 if prompts is None else item.prompt_length for item in encoded]
    tokens = Tokens.pad(
        [item.input_ids[begin:] for item, begin in zip(encoded, begins, strict=True)],
        [item.is_image[begin:] for item, begin in zip(encoded, begins, strict=True)],
        [item.pixels for item in encoded if item.pixels is not None] if prompts is None else (),
    )
    step_counts = torch.tensor([len(chain.steps) for chain in chains])
    targets = _pad([torch.tensor(c.targets or [math.nan] * len(c.steps)) for c in chains], math.nan)  # [B, S]
    return Batch(
        tokens=tokens,
        prompts=prompts,
        prompt_of=None if prompts is None else torch.tensor(prompt_of),
        step_ends=_pad([item.step_ends - begin for item, begin in zip(encoded, begins, strict=True)]),  # [B, S]
        step_mask=torch.arange(int(step_counts.max())) < step_counts[:, None],  # [B, S]
        targets=targets.nan_to_num(nan=0.0),
        target_mask=~targets.isnan(),
        labels=torch.tensor([chain.label for chain in chains]),
        num_labeled_steps=sum(chain.num_labeled_steps for chain in chains),
        chains=tuple(chains),
    )


def by_length(encoded: Sequence[EncodedChain]) -> list[EncodedChain]:
    """Chains of like length next to each other, for little padding; those of one prompt stay together."""
    longest: dict = {}
    for item in encoded:
        key = item.chain.prompt
        longest[key] = max(longest.get(key, 0), len(item.input_ids))
    place = {key: number for number, key in enumerate(longest)}
    return sorted(encoded, key=lambda item: (longest[item.chain.prompt], place[item.chain.prompt]))


def _prompt_key(item: EncodedChain) -> tuple:
    """What two chains of one prompt have in common. A chain whose image is no file shares it by identity."""
    return (item.chain.prompt, id(item.pixels) if item.chain.image is None else None)


def _pad(rows: Sequence[Tensor], value: float = 0) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _moved(holder, device) -> dict[str, Tensor]:
    """The tensors among a dataclass's fields, on `device`."""
    tensors = {field.name: getattr(holder, field.name) for field in fields(holder)}
    return {name: v.to(device, non_blocking=True) for name, v in tensors.items() if isinstance(v, Tensor)}
