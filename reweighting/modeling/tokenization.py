"""Tokenize chains: from questions, steps and images to token ids and pixels.

Each step is tokenized on its own, so that its tokens never depend on the text after it, and one pass over a chain
equals one pass for each prefix. For the same reason chains of one question can share the pass over image and question.

Notation: T tokens of a chain, S steps of a chain.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from reweighting.data.chains import Chain
from reweighting.data.images import image_size, open_image
from reweighting.data.placeholders import PLACEHOLDER
from reweighting.errors import ChainTooLong, UserError
from reweighting.modeling.families import Family, family_of
from reweighting.modeling.prompts import Placeholder, Prompts
from reweighting.terminal import first_line

CACHED_SIZES = 2**16  # of images, and of pieces of prompts; rows with the same image are usually neighbors
ImageKey = tuple[str, bool]  # an image's file, and whether the family reads it as it reads a question's only image
ChainTokens = tuple[Tensor, Tensor, Tensor, int]  # input_ids, is_image, step_ends, prompt_length of an EncodedChain


@dataclass(frozen=True)
class Pixels:
    """Hold a processed image.

    Attributes:
        placeholder: what stands for the image in the prompt, from `Family.placeholder`.
        inputs: the model's inputs for the image; with `features`, only those that the model needs besides these.
        features: output of the vision tower and the projector, [image tokens, ...], if it is known.
    """

    placeholder: Placeholder
    inputs: dict[str, Tensor]
    features: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Count the bytes of the tensors."""
        tensors = list(self.inputs.values()) if self.features is None else [*self.inputs.values(), self.features]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class EncodedChain:
    """Hold a chain as tokens.

    Attributes:
        chain: the chain.
        input_ids: token ids, [T] int64.
        is_image: 1 at image tokens, [T] int64.
        step_ends: position of each step's last token, [S] int64.
        prompt_length: tokens of the prompt, which comes first; the rest are the steps.
        images: those of the question, in order.
    """

    chain: Chain
    input_ids: Tensor
    is_image: Tensor
    step_ends: Tensor
    prompt_length: int
    images: tuple[Pixels, ...]


class ChainTokenizer:
    """Turn chains into tokens and pixels, in the form that the backbone's family takes.

    Args:
        tokenizer: the backbone's.
        image_processor: the backbone's, a transformers image processor; None where its family reads no images.
        config: the backbone's; gives the family and the default of `max_length`.
        max_length: longest chain in tokens; a longer one is a UserError, nothing is ever truncated.
        max_image_side: larger images are shrunk to this many pixels on their longest side; None: never.
        cache_bytes: memory for processed images and tokens, for later epochs; a last question's images are always kept.

    Attributes:
        family: what differs between kinds of models.
        prompts: writes the prompts of questions.
        encode_image: computes an image's features from its pixels, if the vision tower never changes; the features are
            then cached in place of the pixels. None: the model computes them in each pass.

    Raises:
        UserError: tokenizer or chat template cannot be used with images and questions.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        config: PreTrainedConfig,
        *,
        max_length: int | None = None,
        max_image_side: int | None = None,
        cache_bytes: int = 2**30,
    ):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.family = family = family_of(config)(config, tokenizer, image_processor)
        self.max_length: int = max_length or config.get_text_config().max_position_embeddings
        self.max_image_side = max_image_side
        if family.reads_images and (
            family.image_token is None or family.image_token_id in self._tokenize([family.image_token])[0]
        ):
            raise UserError(f"this tokenizer cannot read {family.image_token!r} in a question as plain text.")
        self.prompts = Prompts(tokenizer, family)
        self._pieces: dict[str, list[int]] = {}  # a piece of a prompt -> its tokens
        self._counts: dict[tuple[Placeholder, ...], tuple[int, int]] = {}  # see `_around`
        self._images: dict[ImageKey, Pixels] = {}
        self._tokens: dict[tuple[str, tuple[str, ...], tuple[Placeholder, ...]], ChainTokens] = {}
        self._cache_bytes_left = cache_bytes
        self._last_images: dict[ImageKey, Pixels] = {}
        self._placeholders: dict[tuple[Path, bool], Placeholder] = {}
        self.encode_image: Callable[[Pixels], Tensor] | None = None

    def check_vocabulary(self, rows: int) -> None:
        """Check that the model has an embedding for every token that a text can hold.

        Args:
            rows: of the model's input embedding.

        Raises:
            UserError: it has not.
        """
        # Special tokens can only come from the chat template; published tokenizers have some that no model knows.
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        pieces = (piece for template in self.prompts.templates.values() for piece in template.pieces)
        used = {token for piece in pieces for token in self._template_tokens(piece)}
        for token, index in self.tokenizer.get_vocab().items():
            if index >= rows and (index in used or index not in special):
                raise UserError(
                    f"the tokenizer has the token {token[:60]!r} with the number {index}, and the model embeds {rows} "
                    "tokens: after adding tokens, call model.resize_token_embeddings and save the model again."
                )

    def with_image_encoder(self, encode_image: Callable[[Pixels], Tensor] | None) -> "ChainTokenizer":
        """Copy the tokenizer for a time in which the vision tower does not change.

        Args:
            encode_image: see the attribute.

        Returns:
            A copy that caches the last question's images only.
        """
        other = copy(self)
        other._images, other._tokens, other._last_images, other._cache_bytes_left = {}, {}, {}, 0
        other.encode_image = encode_image
        return other

    def with_features(self, pixels: Pixels) -> Pixels:
        """Replace pixels by features, if this tokenizer computes them.

        Args:
            pixels: a processed image.

        Returns:
            The image in the form that `encode` should give to the model.
        """
        if self.encode_image is None or pixels.features is not None:
            return pixels
        kept = {name: pixels.inputs[name] for name in self.family.kept_inputs}
        return Pixels(pixels.placeholder, kept, self.encode_image(pixels))

    def encode(self, chain: Chain, images: Sequence[Pixels] | None = None) -> EncodedChain:
        """Tokenize a chain: the chat template's user turn, then the steps, one a line, each on its own.

        Args:
            chain: the chain.
            images: replace `chain.images` if they are not files.

        Returns:
            The tokens and the images.

        Raises:
            UserError: an image cannot be read, the question's placeholders do not fit its images, or the chain is
                longer than `max_length`; names the rows.
        """
        try:
            read = self.read_images(chain.images) if images is None else tuple(images)
            tokens = self._cached_tokens(chain, tuple(image.placeholder for image in read))
        except UserError as error:
            raise type(error)(f"{chain.source_location}: {error}") from error
        return EncodedChain(chain, *tokens, read)

    def tokens(self, chain: Chain) -> ChainTokens:
        """Tokenize a chain whose images are files, to the tokens of `encode`. Reads only the images' sizes.

        Args:
            chain: the chain.

        Returns:
            `input_ids`, `is_image`, `step_ends` and `prompt_length` of an `EncodedChain`.

        Raises:
            UserError: as `encode`, without the name of the rows.
        """
        return self._cached_tokens(chain, self._placeholders_of(chain))

    def check(self, chain: Chain) -> None:
        """Check that `encode` will not fail for a chain.

        Reads only the images' sizes, and does not tokenize texts that are short enough to fit in any case, so that a
        million rows can be checked before training.

        Args:
            chain: the chain; its image files have been checked already.

        Raises:
            ChainTooLong: the chain has more than `max_length` tokens.
            UserError: an image has an impossible shape, or the placeholders do not fit the images.
        """
        placeholders = self._placeholders_of(chain)
        around, image = self._around(chain.question, placeholders)
        if around + len(chain.steps) - 1 > self.max_length:  # each further step begins with a newline
            raise self._too_long(around + len(chain.steps) - 1, image, "at least ")
        # A token stands for at least one byte of text; a tokenizer may add one token before each piece.
        text = sum(len(piece.encode()) + 2 for piece in (chain.question, *chain.steps)) + 2 * len(placeholders)
        if around + text > self.max_length:
            self._cached_tokens(chain, placeholders)

    def read_images(self, images: Sequence[Path | str | Image.Image]) -> tuple[Pixels, ...]:
        """Open and process the images of a question; files are cached, each on its own.

        Args:
            images: files, or images in memory.

        Returns:
            The processed images.

        Raises:
            UserError: one cannot be read, or the family cannot read its shape.
        """
        family = self.family.among(len(images))
        keys = [None if isinstance(one, Image.Image) else (str(one), family is self.family) for one in images]
        cached = {key: self._images.get(key) or self._last_images.get(key) for key in keys if key is not None}
        known = {key: pixels for key, pixels in cached.items() if pixels is not None}
        read, before = [], len(known)
        for key, image in zip(keys, images, strict=True):
            pixels = known.get(key) if key is not None else None
            if pixels is None:
                pixels = self._read_image(image, family)
                if key is not None:
                    known[key] = pixels
                    if self._has_room(pixels.nbytes):
                        self._images[key] = pixels
            read.append(pixels)
        if len(known) > before:
            self._last_images = known
        return tuple(read)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write tokenizer and image processor in Hugging Face's layout.

        Args:
            folder: where to.
        """
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)

    def _read_image(self, image: Path | str | Image.Image, family: Family) -> Pixels:
        """Open and process an image, as `family` reads it."""
        try:
            opened = open_image(image, self.max_image_side)
            text, times = placeholder = family.placeholder(opened.height, opened.width)
            tokens = times * text.count(self.family.image_token)
            if tokens > self.max_length:  # before it takes the memory
                raise UserError(f"the image takes {tokens} tokens, and the model takes {self.max_length} in all")
            pixels = Pixels(placeholder, family.process(opened))
        except (UserError, MemoryError):
            raise
        except Exception as error:  # an image 200 times as wide as it is high, or damaged settings of the processor
            raise UserError(f"cannot use the image {_named(image)}: {first_line(error)}") from error
        return self.with_features(pixels)

    def _placeholders_of(self, chain: Chain) -> tuple[Placeholder, ...]:
        """Return what stands for the image files of a chain in its prompt."""
        family = self.family.among(len(chain.images))
        return tuple(self._placeholder(image, family) for image in chain.images)

    def _placeholder(self, image: Path, family: Family) -> Placeholder:
        """Return what stands for an image file in the prompt. Reads only the file's header."""
        key = (image, family is self.family)
        if key not in self._placeholders:
            width, height = image_size(image, self.max_image_side)
            try:
                placeholder = family.placeholder(height, width)
            except (ArithmeticError, ValueError) as error:
                raise UserError(f"cannot use the image {image}: {first_line(error)}") from error
            if len(self._placeholders) >= CACHED_SIZES:
                self._placeholders.clear()
            self._placeholders[key] = placeholder
        return self._placeholders[key]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Tokenize users' texts: `<|image_pad|>` in a question is eleven characters, not a special token."""
        try:
            encoding = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        except Exception as error:  # any kind, where its files are damaged
            raise UserError(f"the tokenizer fails: {first_line(error)}") from error
        return encoding["input_ids"]

    def _around(self, question: str, images: tuple[Placeholder, ...]) -> tuple[int, int]:
        """Count the tokens around the texts of a question, and those of them that are the images'."""
        is_plain = PLACEHOLDER not in question  # then the count depends on the images alone
        counts = self._counts.get(images) if is_plain else None
        if counts is None:
            pieces, _ = self.prompts.write(question, images)
            expansions = self._expansions(images)
            tokens = sum(len(self._piece_tokens(piece)) for piece in pieces)
            counts = tokens - len(expansions) + sum(expansions), sum(expansions)
            if is_plain and len(self._counts) < CACHED_SIZES:
                self._counts[images] = counts
        return counts

    def _expansions(self, images: tuple[Placeholder, ...]) -> list[int]:
        """How many tokens each image token of a prompt stands for, in order."""
        return [times for text, times in images for _ in range(text.count(self.family.image_token))]

    def _piece_tokens(self, piece: str) -> list[int]:
        """Tokenize a piece of a prompt; pieces are cached."""
        tokens = self._pieces.get(piece)
        if tokens is None:
            if len(self._pieces) >= CACHED_SIZES:
                self._pieces.clear()
            tokens = self._pieces[piece] = self._template_tokens(piece)
        return tokens

    def _template_tokens(self, text: str) -> list[int]:
        """Tokenize text of the chat template, in which special tokens count as such."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
        except Exception as error:  # as in `_tokenize`
            raise UserError(f"the tokenizer fails: {first_line(error)}") from error

    def _cached_tokens(self, chain: Chain, images: tuple[Placeholder, ...]) -> ChainTokens:
        """Return what `_chain_tokens` gives, from the cache if it is there."""
        key = (chain.question, chain.steps, images)
        tokens = self._tokens.get(key)
        if tokens is None:
            tokens = self._chain_tokens(*key)
            if self._has_room(sum(tensor.nbytes for tensor in tokens[:3])):
                self._tokens[key] = tokens
        return tokens

    def _chain_tokens(self, question: str, steps: Sequence[str], images: tuple[Placeholder, ...]) -> ChainTokens:
        """Concatenate prompt and steps. Raises UserError if the result is longer than `max_length`."""
        pieces, texts = self.prompts.write(question, images)
        expansions, image = iter(self._expansions(images)), self.family.image_token_id
        # The newline comes before a step, so that a score is read at the last word of the step itself.
        lines = [step.strip() if number == 0 else "\n" + step.strip() for number, step in enumerate(steps)]
        tokens = self._tokenize([*texts, *lines])
        ids, step_ends = [], []
        for piece, text_ids in zip(pieces, [*tokens[: len(texts)], []], strict=True):
            piece_ids = self._piece_tokens(piece)
            ids += [token for token in piece_ids for _ in range(next(expansions) if token == image else 1)]
            ids += text_ids
        prompt_length = len(ids)
        for step_ids in tokens[len(texts) :]:
            ids.extend(step_ids)
            step_ends.append(len(ids) - 1)
        if len(ids) > self.max_length:
            raise self._too_long(len(ids), ids.count(image))
        input_ids = torch.tensor(ids)  # [T]
        return input_ids, (input_ids == image).long(), torch.tensor(step_ends), prompt_length

    def _too_long(self, tokens: int, image: int, least: str = "") -> ChainTooLong:
        of_image = f" ({image} of them are the images': a smaller max_image_side saves some)" if image else ""
        return ChainTooLong(
            f"{least}{tokens} tokens, but the model takes {self.max_length}{of_image}. Shorten the text or leave the "
            "row out."
        )

    def _has_room(self, size: int) -> bool:
        """Reserve bytes of the cache. A full cache keeps what it has: epochs visit everything once, so evicting the
        oldest entry would evict each one just before its next use."""
        if size > self._cache_bytes_left:
            return False
        self._cache_bytes_left -= size
        return True


def _named(image: Path | str | Image.Image) -> str:
    """Name an image in a message."""
    return "in memory" if isinstance(image, Image.Image) else str(image)
