"""From chains to what the model reads: tokens and pixels, then padded batches.

Each step is tokenised on its own: its tokens never depend on what follows, and one pass over a chain equals one pass
for each prefix. So chains of one question may also share the pass over their prompt, the image and the question.

Notation:
    B  chains in a batch             P  image patches before merging, all images of a batch together
    S  steps of the longest chain    C  numbers in a patch (channels * frames * height * width)
    T  tokens of the longest text    I  images in a batch (chains without an image have none)
    Q  prompts in a batch, where chains share them
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from reweighting.chains import Chain
from reweighting.errors import UserError
from reweighting.images import open_image, shrunk_size

REMEMBERED_LENGTHS = 2**16  # of images: rows with one image mostly stand together
QUESTION_SLOT = "\ue000question\ue000"  # private-use characters: they stand in no chat template


@dataclass(frozen=True)
class Pixels:
    """A processed image: `values` [patches, C] float32 and `grid` [1, 3] (frames, rows, columns); or, once the model's
    vision tower has seen it, `features` [image tokens, D] and no patches."""

    values: Tensor
    grid: Tensor
    features: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self.values.nbytes + (0 if self.features is None else self.features.nbytes)


@dataclass(frozen=True)
class EncodedChain:
    """A chain as tokens: `input_ids` [T], `is_image` [T] (1 at image tokens, the model's
    mm_token_type_ids), `step_ends` [S] (position of each step's last token), all int64; the first
    `prompt_length` tokens are the prompt, the rest are the steps."""

    chain: Chain
    input_ids: Tensor
    is_image: Tensor
    step_ends: Tensor
    prompt_length: int
    pixels: Pixels | None


class ChainTokenizer:
    """Chains -> tokens and pixels, for models that read images as a grid of patches (the Qwen-VL family).

    Args:
        tokenizer, image_processor: of the backbone, from AutoTokenizer and AutoImageProcessor.
        config: the backbone's; gives the image token and the default of `max_length`.
        max_length: tokens the model takes; a longer chain is a UserError, nothing is ever cut.
        max_image_side: larger images are shrunk to this many pixels on their longest side; None: never.
        cache_bytes: memory for processed images and tokens, for later epochs; the last image is always remembered.

    see: what makes an image's features of its Pixels, where the vision tower never changes; they are then remembered
    in place of the patches. None where the model sees the patches anew each time.
    """

    def __init__(self, tokenizer, image_processor, config, *, max_length=None, max_image_side=None, cache_bytes=2**30):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.max_length = max_length or config.get_text_config().max_position_embeddings
        self.max_image_side = max_image_side
        self.image_token_id = getattr(config, "image_token_id", None)
        self.merge = getattr(image_processor, "merge_size", None)
        if self.image_token_id is None or self.merge is None:
            raise UserError(f"a {config.model_type} model does not read images as Qwen2-VL does.")
        self.image_token = tokenizer.convert_ids_to_tokens(self.image_token_id)
        if self.image_token_id in self._tokenize([self.image_token or ""])[0]:
            raise UserError(f"this tokenizer cannot read {self.image_token!r} in a question as plain text.")
        # The template's own pieces are the only text in which special tokens count as such.
        self.around_image, self.around_text = self._template(True), self._template(False)
        self._cache: dict = {}  # image path -> Pixels; (question, steps, image tokens) -> token tensors
        self._cache_bytes_left = cache_bytes
        self._last_image: dict[str, Pixels] = {}
        self._image_lengths: dict[Path, int] = {}
        self.see: Callable[[Pixels], Tensor] | None = None

    def seeing(self, see: Callable[[Pixels], Tensor]) -> "ChainTokenizer":
        """The same tokenizer for a vision tower that does not change meanwhile, remembering the last image only."""
        other = copy(self)
        other._cache, other._cache_bytes_left, other._last_image, other.see = {}, 0, {}, see
        return other

    def seen(self, pixels: Pixels) -> Pixels:
        """The image as the model wants it: its features where `see` makes them."""
        if self.see is None or pixels.features is not None:
            return pixels
        return Pixels(pixels.values[:0].clone(), pixels.grid, self.see(pixels))

    def encode(self, chain: Chain, pixels: Pixels | None = None) -> EncodedChain:
        """Tokens of a chain: the chat template's user turn, then the steps, one a line, piece by piece.

        `pixels` stands in for `chain.image` where the image is no file. Raises UserError (naming the rows)
        if the image cannot be read or the chain is longer than `max_length` tokens.
        """
        try:
            if pixels is None and chain.image is not None:
                pixels = self.read_image(chain.image)
            tokens = self._tokens(chain, 0 if pixels is None else int(pixels.grid.prod()) // self.merge**2)
        except UserError as error:
            raise type(error)(f"{chain.place}: {error}") from error
        return EncodedChain(chain, *tokens, pixels)

    def check(self, chain: Chain) -> None:
        """Raise the UserError of `encode` for a chain that is too long, or an image of an impossible shape.

        Reads no more of the image than its size, and tokenises no text so short that it must fit, so that a million
        rows can be checked before training.
        """
        try:
            image_tokens = 0 if chain.image is None else self._image_tokens(chain.image)
            before, after = self.around_image if image_tokens else self.around_text
            # A token stands for a byte of text at least; a tokenizer may put one more before each piece.
            text = sum(len(piece.encode()) + 2 for piece in (chain.question, *chain.steps))
            if len(before) + image_tokens + len(after) + text > self.max_length:
                self._tokens(chain, image_tokens)
        except UserError as error:
            raise UserError(f"{chain.place}: {error}") from error

    def _image_tokens(self, image: Path) -> int:
        """How many tokens an image file takes, upright or lying on its side."""
        if image not in self._image_lengths:
            try:
                with Image.open(image) as opened:
                    width, height = shrunk_size(opened.size, self.max_image_side)
                patches = self.image_processor.get_number_of_image_patches(height, width)
            except Exception as error:  # as in `open_image`
                raise UserError(f"cannot use the image {image}: {error}") from error
            if len(self._image_lengths) >= REMEMBERED_LENGTHS:
                self._image_lengths.clear()
            self._image_lengths[image] = patches // self.merge**2
        return self._image_lengths[image]

    def _tokens(self, chain: Chain, image_tokens: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """What `_join` gives, remembered."""
        key = (chain.question, chain.steps, image_tokens)
        tokens = self._cache.get(key)
        if tokens is None:
            tokens = self._join(*key)
            self._remember(key, tokens, sum(tensor.nbytes for tensor in tokens[:-1]))
        return tokens

    def read_image(self, image: Path | str | Image.Image) -> Pixels:
        """Open and process one image. Files are remembered. Raises UserError if it cannot be read."""
        key = None if isinstance(image, Image.Image) else str(image)
        if known := self._cache.get(key) or self._last_image.get(key):
            return known
        try:
            processed = self.image_processor(images=[open_image(image, self.max_image_side)], return_tensors="pt")
        except ValueError as error:  # for one, an image 200 times as wide as it is high
            raise UserError(f"cannot use the image {image}: {error}") from error
        pixels = self.seen(Pixels(processed["pixel_values"].float(), processed["image_grid_thw"].long()))
        if key is not None:
            self._remember(key, pixels, pixels.nbytes)
            self._last_image = {key: pixels}
        return pixels

    def save_pretrained(self, folder: Path | str) -> None:
        """Write tokenizer and image processor into `folder`, in Hugging Face's layout."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Tokens of users' texts: `<|image_pad|>` in a question is eleven characters, not a special token."""
        encoding = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return encoding["input_ids"]

    def _join(self, question: str, steps: Sequence[str], image_tokens: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """input_ids, is_image, step_ends and prompt_length of EncodedChain. Raises UserError if they are too many."""
        before, after = self.around_image if image_tokens else self.around_text
        if image_tokens:
            at = before.index(self.image_token_id)
            before = before[:at] + [self.image_token_id] * image_tokens + before[at + 1 :]
        # The newline goes before a step, so that a score is read at the last word of the step itself.
        pieces = [step.strip() if number == 0 else "\n" + step.strip() for number, step in enumerate(steps)]
        question_ids, *steps_ids = self._tokenize([question, *pieces])
        ids, step_ends = before + question_ids + after, []
        prompt_length = len(ids)
        for step_ids in steps_ids:
            ids = ids + step_ids
            step_ends.append(len(ids) - 1)
        if len(ids) > self.max_length:
            raise UserError(
                f"{len(ids)} tokens, but the model takes {self.max_length} ({image_tokens} of them are the "
                "image's: a smaller max_image_side saves some). Shorten the text or leave the row out."
            )
        input_ids = torch.tensor(ids)
        return input_ids, (input_ids == self.image_token_id).long(), torch.tensor(step_ends), prompt_length

    def _remember(self, key, value, size: int) -> None:
        # When full, keep what is there: epochs visit everything once, so throwing out the oldest would
        # throw out each thing just before its next use.
        if size <= self._cache_bytes_left:
            self._cache_bytes_left -= size
            self._cache[key] = value

    def _template(self, with_image: bool) -> tuple[list[int], list[int]]:
        """Tokens before and after the question, from the chat template or, without one, a plain form."""
        image = f"<|vision_start|>{self.image_token}<|vision_end|>" if with_image else ""
        text = f"User: {image}{QUESTION_SLOT}\nAssistant: "
        if self.tokenizer.chat_template:
            content = [{"type": "image"}] if with_image else []
            message = {"role": "user", "content": [*content, {"type": "text", "text": QUESTION_SLOT}]}
            text = self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        before, *after = text.split(QUESTION_SLOT)
        encode = self.tokenizer.encode
        ids = [encode(t, add_special_tokens=False, split_special_tokens=False) for t in (before, *after)]
        if len(ids) != 2 or ids[0].count(self.image_token_id) != with_image:
            raise UserError(
                "the tokenizer's chat template must place the image, then the question, once each; "
                f"it gave {text.replace(QUESTION_SLOT, '{question}')!r}"
            )
        return ids[0], ids[1]


@dataclass(frozen=True)
class Tokens:
    """What the backbone reads in one pass, padded on the right.

    input_ids, attention_mask, mm_token_type_ids: [B, T] int64.
    pixel_values [P, C] float32 and image_grid_thw [I, 3] int64, or None where there is no image.
    image_features: one [image tokens, D] for each image, in place of pixel_values, where they are known; else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mm_token_type_ids: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    image_features: tuple[Tensor, ...] | None = None

    @classmethod
    def pad(cls, texts: Sequence[Tensor], is_image: Sequence[Tensor], images: Sequence[Pixels] = ()) -> "Tokens":
        """Put texts and their images together."""
        lengths = torch.tensor([len(text) for text in texts])
        # Padding repeats each text's last token: masked anyway, and never by accident the image token.
        positions = torch.arange(int(lengths.max()))
        padded = [text[positions.clamp(max=len(text) - 1)] for text in texts]
        known = bool(images) and images[0].features is not None  # of one tokenizer all are, or none is
        return cls(
            input_ids=torch.stack(padded),
            attention_mask=(positions < lengths[:, None]).long(),
            mm_token_type_ids=_pad(is_image),
            pixel_values=torch.cat([image.values for image in images]) if images and not known else None,
            image_grid_thw=torch.cat([image.grid for image in images]) if images else None,
            image_features=tuple(image.features for image in images) if known else None,
        )

    def to(self, device) -> "Tokens":
        """The same on `device`."""
        moved = _moved(self, device)
        if self.image_features is not None:
            moved["image_features"] = tuple(f.to(device, non_blocking=True) for f in self.image_features)
        return replace(self, **moved)

    def model_inputs(self) -> dict[str, Tensor]:
        """The backbone's keyword arguments."""
        names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Batch:
    """Chains of a batch.

    tokens: the chains [B, T]; or, where they share prompts, what follows these.
    prompts [Q, T] and prompt_of [B]: the prompts, and each chain's; None where nothing is shared.
    step_ends [B, S] int64: position in `tokens` of a step's last token (0 where there is no step); step_mask [B, S]
    bool: the step exists.
    targets [B, S] float32 (0 where there is none) and target_mask [B, S] bool: the step has a label.
    labels [B] float32: 1 / 0 for a right / wrong final answer, NaN if unknown.
    labelled: how many steps have a label. chains: where all of it comes from.
    """

    tokens: Tokens
    prompts: Tokens | None
    prompt_of: Tensor | None
    step_ends: Tensor
    step_mask: Tensor
    targets: Tensor
    target_mask: Tensor
    labels: Tensor
    labelled: int
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
        labelled=sum(not math.isnan(target) for chain in chains for target in chain.targets),
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
