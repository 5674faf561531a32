"""From chains to what the model reads: tokens and pixels, then padded batches.

Each step is tokenised on its own: its tokens never depend on what follows, and one pass over a chain equals one pass
for each prefix. So chains of one question may also share the pass over their prompt, the image and the question.

Notation:
    B  chains in a batch             T  tokens of the longest text
    S  steps of the longest chain    Q  prompts in a batch, where chains share them
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from reweighting.data.chains import Chain
from reweighting.data.images import open_image, shrunk_size
from reweighting.errors import UserError
from reweighting.modeling.families import family_of

REMEMBERED_SIZES = 2**16  # of images: rows with one image mostly stand together
QUESTION_SLOT = "\ue000question\ue000"  # private-use characters: they stand in no chat template


@dataclass(frozen=True)
class Pixels:
    """A processed image: the model's `inputs` for it; or, once the model's vision tower has seen it, its `features`
    [image tokens, …] and those inputs that are wanted beside them. `placeholder`: what stands for it in the prompt, as
    `Family.placeholder` says it."""

    placeholder: tuple[str, int]
    inputs: dict[str, Tensor]
    features: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        tensors = list(self.inputs.values()) if self.features is None else [*self.inputs.values(), self.features]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class EncodedChain:
    """A chain as tokens: `input_ids` [T], `is_image` [T] (1 at image tokens), `step_ends` [S] (position of each step's
    last token), all int64; the first `prompt_length` tokens are the prompt, the rest are the steps."""

    chain: Chain
    input_ids: Tensor
    is_image: Tensor
    step_ends: Tensor
    prompt_length: int
    pixels: Pixels | None


class ChainTokenizer:
    """Chains -> tokens and pixels, as the backbone's family wants them.

    Args:
        tokenizer, image_processor: of the backbone, from AutoTokenizer and AutoImageProcessor.
        config: the backbone's; gives the family and the default of `max_length`.
        max_length: tokens the model takes; a longer chain is a UserError, nothing is ever cut.
        max_image_side: larger images are shrunk to this many pixels on their longest side; None: never.
        cache_bytes: memory for processed images and tokens, for later epochs; the last image is always remembered.

    family: what differs between kinds of models. see: what makes an image's features of its Pixels, where the vision
    tower never changes; they are then remembered in place of the pixels. None where the model sees them anew each time.
    """

    def __init__(self, tokenizer, image_processor, config, *, max_length=None, max_image_side=None, cache_bytes=2**30):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.family = family = family_of(config)(config, tokenizer, image_processor)
        self.max_length = max_length or config.get_text_config().max_position_embeddings
        self.max_image_side = max_image_side
        if family.image_token is None or family.image_token_id in self._tokenize([family.image_token])[0]:
            raise UserError(f"this tokenizer cannot read {family.image_token!r} in a question as plain text.")
        self.around_image, self.around_text = self._template(True), self._template(False)
        self._prompts: dict[str, tuple[list[int], list[int]]] = {}  # what stands for an image -> tokens around it
        self._cache: dict = {}  # image path -> Pixels; (question, steps, placeholder) -> token tensors
        self._cache_bytes_left = cache_bytes
        self._last_image: dict[str, Pixels] = {}
        self._placeholders: dict[Path, tuple[str, int]] = {}
        self.encode_image: Callable[[Pixels], Tensor] | None = None

    def with_image_encoder(self, see: Callable[[Pixels], Tensor]) -> "ChainTokenizer":
        """The same tokenizer for a vision tower that does not change meanwhile, remembering the last image only."""
        other = copy(self)
        other._cache, other._cache_bytes_left, other._last_image, other.encode_image = {}, 0, {}, see
        return other

    def with_features(self, pixels: Pixels) -> Pixels:
        """The image as the model wants it: its features where `see` makes them."""
        if self.encode_image is None or pixels.features is not None:
            return pixels
        kept = {name: pixels.inputs[name] for name in self.family.kept_inputs}
        return Pixels(pixels.placeholder, kept, self.encode_image(pixels))

    def encode(self, chain: Chain, pixels: Pixels | None = None) -> EncodedChain:
        """Tokens of a chain: the chat template's user turn, then the steps, one a line, piece by piece.

        `pixels` stands in for `chain.image` where the image is no file. Raises UserError (naming the rows)
        if the image cannot be read or the chain is longer than `max_length` tokens.
        """
        try:
            if pixels is None and chain.image is not None:
                pixels = self.read_image(chain.image)
            tokens = self._tokens(chain, pixels and pixels.placeholder)
        except UserError as error:
            raise type(error)(f"{chain.source_location}: {error}") from error
        return EncodedChain(chain, *tokens, pixels)

    def check(self, chain: Chain) -> None:
        """Raise the UserError of `encode` for a chain that is too long, or an image of an impossible shape.

        Reads no more of the image than its size, and tokenises no text so short that it must fit, so that a million
        rows can be checked before training.
        """
        try:
            placeholder = chain.image and self._placeholder(chain.image)
            before, after, times = self._prompt(placeholder)
            image = (times - 1) * before.count(self.family.image_token_id)
            # A token stands for a byte of text at least; a tokenizer may put one more before each piece.
            text = sum(len(piece.encode()) + 2 for piece in (chain.question, *chain.steps))
            if len(before) + image + len(after) + text > self.max_length:
                self._tokens(chain, placeholder)
        except UserError as error:
            raise UserError(f"{chain.source_location}: {error}") from error

    def _placeholder(self, image: Path) -> tuple[str, int]:
        """What stands for an image file in the prompt, upright or lying on its side."""
        if image not in self._placeholders:
            try:
                with Image.open(image) as opened:
                    width, height = shrunk_size(opened.size, self.max_image_side)
                placeholder = self.family.placeholder(height, width)
            except Exception as error:  # as in `open_image`
                raise UserError(f"cannot use the image {image}: {error}") from error
            if len(self._placeholders) >= REMEMBERED_SIZES:
                self._placeholders.clear()
            self._placeholders[image] = placeholder
        return self._placeholders[image]

    def _tokens(self, chain: Chain, placeholder: tuple[str, int] | None) -> tuple[Tensor, Tensor, Tensor, int]:
        """What `_join` gives, remembered."""
        key = (chain.question, chain.steps, placeholder)
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
            opened = open_image(image, self.max_image_side)
            pixels = Pixels(self.family.placeholder(opened.height, opened.width), self.family.process(opened))
        except ValueError as error:  # for one, an image 200 times as wide as it is high
            raise UserError(f"cannot use the image {image}: {error}") from error
        pixels = self.with_features(pixels)
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

    def _prompt(self, placeholder: tuple[str, int] | None) -> tuple[list[int], list[int], int]:
        """Tokens before and after the question, with this in the image's place (None: without an image), and how many
        each image token among them stands for."""
        text, times = placeholder or ("", 1)
        if text not in self._prompts:
            # The template's own pieces and the placeholder are the only text in which special tokens count as such.
            pieces = self.around_text if placeholder is None else self.around_image
            pieces = [piece.replace(self.family.template_token, text) for piece in pieces]
            encode = self.tokenizer.encode
            before, after = (encode(piece, add_special_tokens=False, split_special_tokens=False) for piece in pieces)
            self._prompts[text] = before, after
        return *self._prompts[text], times

    def _join(
        self, question: str, steps: Sequence[str], placeholder: tuple[str, int] | None
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """input_ids, is_image, step_ends and prompt_length of EncodedChain. Raises UserError if they are too many."""
        before, after, times = self._prompt(placeholder)
        image = self.family.image_token_id
        before = [token for token in before for _ in range(times if token == image else 1)]
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
                f"{len(ids)} tokens, but the model takes {self.max_length} ({before.count(image)} of them are the "
                "image's: a smaller max_image_side saves some). Shorten the text or leave the row out."
            )
        input_ids = torch.tensor(ids)
        return input_ids, (input_ids == image).long(), torch.tensor(step_ends), prompt_length

    def _remember(self, key, value, size: int) -> None:
        # When full, keep what is there: epochs visit everything once, so throwing out the oldest would
        # throw out each thing just before its next use.
        if size <= self._cache_bytes_left:
            self._cache_bytes_left -= size
            self._cache[key] = value

    def _template(self, with_image: bool) -> tuple[str, str]:
        """The prompt before and after the question, from the chat template or, without one, in a plain form."""
        token = self.family.template_token
        image = (self.family.plain_image or token) if with_image else ""
        text = f"User: {image}{QUESTION_SLOT}\nAssistant: "
        if self.tokenizer.chat_template:
            content = [{"type": "image"}] if with_image else []
            message = {"role": "user", "content": [*content, {"type": "text", "text": QUESTION_SLOT}]}
            text = self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        pieces = text.split(QUESTION_SLOT)
        if len(pieces) != 2 or pieces[0].count(token) != with_image:
            raise UserError(
                "the tokenizer's chat template must place the image, then the question, once each; "
                f"it gave {text.replace(QUESTION_SLOT, '{question}')!r}"
            )
        return pieces[0], pieces[1]
