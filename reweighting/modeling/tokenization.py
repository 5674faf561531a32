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
from reweighting.errors import ChainTooLong, UserError
from reweighting.modeling.families import family_of
from reweighting.terminal import first_line

CACHED_SIZES = 2**16  # of images; rows with the same image are usually neighbors
# Replaces the function by which chat templates name today's date: scores must not change from day to day.
FIXED_DATE = "{% macro strftime_now(format) %}1 January 2025{% endmacro %}"
QUESTION_SLOT = "\ue000question\ue000"  # private-use characters: no chat template contains them

Placeholder = tuple[str, int]  # see `Family.placeholder`
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
        pixels: the image, or None.
    """

    chain: Chain
    input_ids: Tensor
    is_image: Tensor
    step_ends: Tensor
    prompt_length: int
    pixels: Pixels | None


class ChainTokenizer:
    """Turn chains into tokens and pixels, in the form that the backbone's family takes.

    Args:
        tokenizer: the backbone's.
        image_processor: the backbone's, a transformers image processor; None where its family reads no images.
        config: the backbone's; gives the family and the default of `max_length`.
        max_length: longest chain in tokens; a longer one is a UserError, nothing is ever truncated.
        max_image_side: larger images are shrunk to this many pixels on their longest side; None: never.
        cache_bytes: memory for processed images and tokens, for later epochs; the last image is always kept.

    Attributes:
        family: what differs between kinds of models.
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
        self.around_image, self.around_text = self._template(family.reads_images), self._template(False)
        self._prompts: dict[str, tuple[list[int], list[int]]] = {}  # a placeholder's text -> tokens around the question
        self._images: dict[str, Pixels] = {}
        self._tokens: dict[tuple[str, tuple[str, ...], Placeholder | None], ChainTokens] = {}
        self._cache_bytes_left = cache_bytes
        self._last_image: dict[str, Pixels] = {}
        self._placeholders: dict[Path, Placeholder] = {}
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
        used = {token for piece in (*self.around_image, *self.around_text) for token in self._template_tokens(piece)}
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
            A copy that caches the last image only.
        """
        other = copy(self)
        other._images, other._tokens, other._last_image, other._cache_bytes_left = {}, {}, {}, 0
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

    def encode(self, chain: Chain, pixels: Pixels | None = None) -> EncodedChain:
        """Tokenize a chain: the chat template's user turn, then the steps, one a line, each on its own.

        Args:
            chain: the chain.
            pixels: replaces `chain.image` if the image is not a file.

        Returns:
            The tokens and the image.

        Raises:
            UserError: the image cannot be read, or the chain is longer than `max_length`; names the rows.
        """
        try:
            if pixels is None and chain.image is not None:
                pixels = self.read_image(chain.image)
            tokens = self._cached_tokens(chain, None if pixels is None else pixels.placeholder)
        except UserError as error:
            raise type(error)(f"{chain.source_location}: {error}") from error
        return EncodedChain(chain, *tokens, pixels)

    def check(self, chain: Chain) -> None:
        """Check that `encode` will not fail for a chain.

        Reads only the image's size, and does not tokenize texts that are short enough to fit in any case, so that a
        million rows can be checked before training.

        Args:
            chain: the chain; its image file has been checked already.

        Raises:
            ChainTooLong: the chain has more than `max_length` tokens.
            UserError: the image has an impossible shape.
        """
        placeholder = None if chain.image is None else self._placeholder(chain.image)
        before, after, times = self._prompt_tokens(placeholder)
        image = times * before.count(self.family.image_token_id)
        around = len(before) - before.count(self.family.image_token_id) + image + len(after)
        if around + len(chain.steps) - 1 > self.max_length:  # each further step begins with a newline
            raise self._too_long(around + len(chain.steps) - 1, image, "at least ")
        # A token stands for at least one byte of text; a tokenizer may add one token before each piece.
        text = sum(len(piece.encode()) + 2 for piece in (chain.question, *chain.steps))
        if around + text > self.max_length:
            self._cached_tokens(chain, placeholder)

    def read_image(self, image: Path | str | Image.Image) -> Pixels:
        """Open and process an image; files are cached.

        Args:
            image: a file, or an image in memory.

        Returns:
            The processed image.

        Raises:
            UserError: it cannot be read, or the family cannot read its shape.
        """
        key = None if isinstance(image, Image.Image) else str(image)
        if key is not None and (cached := self._images.get(key) or self._last_image.get(key)):
            return cached
        try:
            opened = open_image(image, self.max_image_side)
            text, times = placeholder = self.family.placeholder(opened.height, opened.width)
            tokens = times * text.count(self.family.image_token)
            if tokens > self.max_length:  # before it takes the memory
                raise UserError(f"the image takes {tokens} tokens, and the model takes {self.max_length} in all")
            pixels = Pixels(placeholder, self.family.process(opened))
        except (UserError, MemoryError):
            raise
        except Exception as error:  # an image 200 times as wide as it is high, or damaged settings of the processor
            raise UserError(f"cannot use the image {_named(image)}: {first_line(error)}") from error
        pixels = self.with_features(pixels)
        if key is not None:
            if self._has_room(pixels.nbytes):
                self._images[key] = pixels
            self._last_image = {key: pixels}
        return pixels

    def save_pretrained(self, folder: Path | str) -> None:
        """Write tokenizer and image processor in Hugging Face's layout.

        Args:
            folder: where to.
        """
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)

    def _placeholder(self, image: Path) -> Placeholder:
        """Return what stands for an image file in the prompt. Reads only the file's header."""
        if image not in self._placeholders:
            width, height = image_size(image, self.max_image_side)
            try:
                placeholder = self.family.placeholder(height, width)
            except (ArithmeticError, ValueError) as error:
                raise UserError(f"cannot use the image {image}: {first_line(error)}") from error
            if len(self._placeholders) >= CACHED_SIZES:
                self._placeholders.clear()
            self._placeholders[image] = placeholder
        return self._placeholders[image]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Tokenize users' texts: `<|image_pad|>` in a question is eleven characters, not a special token."""
        try:
            encoding = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        except Exception as error:  # any kind, where its files are damaged
            raise UserError(f"the tokenizer fails: {first_line(error)}") from error
        return encoding["input_ids"]

    def _prompt_tokens(self, placeholder: Placeholder | None) -> tuple[list[int], list[int], int]:
        """Return the tokens before and after the question, and how many tokens each image token there stands for."""
        text, times = placeholder or ("", 1)
        if text not in self._prompts:
            pieces = self.around_text
            if placeholder is not None:
                pieces = [piece.replace(self.family.template_token, text) for piece in self.around_image]
            before, after = map(self._template_tokens, pieces)
            self._prompts[text] = before, after
        return *self._prompts[text], times

    def _template_tokens(self, text: str) -> list[int]:
        """Tokenize text of the chat template, in which special tokens count as such."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
        except Exception as error:  # as in `_tokenize`
            raise UserError(f"the tokenizer fails: {first_line(error)}") from error

    def _cached_tokens(self, chain: Chain, placeholder: Placeholder | None) -> ChainTokens:
        """Return what `_chain_tokens` gives, from the cache if it is there."""
        key = (chain.question, chain.steps, placeholder)
        tokens = self._tokens.get(key)
        if tokens is None:
            tokens = self._chain_tokens(*key)
            if self._has_room(sum(tensor.nbytes for tensor in tokens[:3])):
                self._tokens[key] = tokens
        return tokens

    def _chain_tokens(self, question: str, steps: Sequence[str], placeholder: Placeholder | None) -> ChainTokens:
        """Concatenate prompt and steps. Raises UserError if the result is longer than `max_length`."""
        before, after, times = self._prompt_tokens(placeholder)
        image = self.family.image_token_id
        before = [token for token in before for _ in range(times if token == image else 1)]
        # The newline comes before a step, so that a score is read at the last word of the step itself.
        pieces = [step.strip() if number == 0 else "\n" + step.strip() for number, step in enumerate(steps)]
        question_ids, *steps_ids = self._tokenize([question, *pieces])
        ids, step_ends = [*before, *question_ids, *after], []
        prompt_length = len(ids)
        for step_ids in steps_ids:
            ids.extend(step_ids)
            step_ends.append(len(ids) - 1)
        if len(ids) > self.max_length:
            raise self._too_long(len(ids), before.count(image))
        input_ids = torch.tensor(ids)  # [T]
        return input_ids, (input_ids == image).long(), torch.tensor(step_ends), prompt_length

    def _too_long(self, tokens: int, image: int, least: str = "") -> ChainTooLong:
        of_image = f" ({image} of them are the image's: a smaller max_image_side saves some)" if image else ""
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

    def _start(self) -> str:
        """Return the token that the tokenizer itself puts before a text, which some models need; most have none."""
        start = self.tokenizer.bos_token_id
        return str(self.tokenizer.bos_token) if start is not None and start in self.tokenizer("")["input_ids"] else ""

    def _template(self, with_image: bool) -> tuple[str, str]:
        """Return the prompt before and after the question, from the chat template or, without one, in a plain form."""
        token = self.family.template_token
        image = (self.family.plain_image or token) if with_image else ""
        text = f"{self._start()}User: {image}{QUESTION_SLOT}\nAssistant: "
        if self.tokenizer.chat_template:
            content: Any = QUESTION_SLOT  # text-only templates take no list of parts
            if self.family.reads_images:
                content = [{"type": "image"}] * with_image + [{"type": "text", "text": QUESTION_SLOT}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            try:
                template = FIXED_DATE + self.tokenizer.get_chat_template()
                text = str(
                    self.tokenizer.apply_chat_template(
                        messages, chat_template=template, tokenize=False, add_generation_prompt=True
                    )
                )
            except Exception as error:  # of jinja2, or any that the template itself raises
                raise UserError(f"the tokenizer's chat template fails: {first_line(error)}") from error
        pieces = text.split(QUESTION_SLOT)
        if len(pieces) != 2 or (token and pieces[0].count(token) != with_image):
            given = repr(text.replace(QUESTION_SLOT, "{question}"))
            parts = "image, then the question, once each" if token else "question once"
            raise UserError(f"the tokenizer's chat template must place the {parts}; it gave "
                            f"{given[:200]}{' ...' if len(given) > 200 else ''}")  # fmt: skip
        return pieces[0], pieces[1]


def _named(image: Path | str | Image.Image) -> str:
    """Name an image in a message."""
    return "in memory" if isinstance(image, Image.Image) else str(image)
