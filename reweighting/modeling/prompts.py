"""Write the prompt of a question: the chat template's user turn, with the question's images where they stand in it.

The texts of the question stay apart from the template, because special tokens in them count as plain text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from reweighting.data.placeholders import question_parts
from reweighting.errors import UserError
from reweighting.modeling.families import Family
from reweighting.terminal import first_line

TEXT_SLOT = "\ue000text\ue000"  # private-use characters: no chat template contains them
# Replaces the function by which chat templates name today's date: scores must not change from day to day.
FIXED_DATE = "{% macro strftime_now(format) %}1 January 2025{% endmacro %}"
IMAGE, TEXT = "I", "T"  # a layout has a letter for each part of a question, in order

Placeholder = tuple[str, int]  # see `Family.placeholder`


@dataclass(frozen=True)
class Template:
    """Hold what stands around the texts of a question.

    Attributes:
        pieces: before the first text, between two texts, and after the last one. Each image is the family's
            `template_token`.
        strips: whether the chat template strips the texts.
    """

    pieces: tuple[str, ...]
    strips: bool


class Prompts:
    """Write prompts.

    Args:
        tokenizer: the backbone's; gives the chat template. Without one, a plain form is used.
        family: the backbone's.

    Attributes:
        templates: of the layouts that came up so far; at first a text alone, and a text behind an image.

    Raises:
        UserError: the chat template cannot be used with images and questions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: Family):
        self.tokenizer, self.family = tokenizer, family
        layouts = (IMAGE + TEXT, TEXT) if family.reads_images else (TEXT,)
        self.templates = {layout: self._template(layout) for layout in layouts}

    def write(self, question: str, images: Sequence[Placeholder]) -> tuple[list[str], list[str]]:
        """Write the prompt of a question.

        Args:
            question: the text, with `<image>` placeholders or without.
            images: what stands for each of its images.

        Returns:
            The pieces of the template, images in place, and the texts of the question: one between two pieces.

        Raises:
            UserError: the placeholders do not fit the images, or the chat template cannot hold several images.
        """
        parts = question_parts(question, len(images))
        layout = "".join(IMAGE if part is None else TEXT for part in parts)
        if layout not in self.templates:
            self.templates[layout] = self._template(layout)
        template = self.templates[layout]
        shown = iter(text for text, _ in images)
        pieces = []
        for piece in template.pieces:
            start, *rest = piece.split(self.family.template_token) if images else [piece]
            pieces.append(start + "".join(next(shown) + text for text in rest))
        return _joined(pieces, [part.strip() if template.strips else part for part in parts if part is not None])

    def _template(self, layout: str) -> Template:
        """Find what stands around the texts of a layout. Raises UserError if the chat template cannot hold it."""
        for slot, strips in ((f" {TEXT_SLOT} ", False), (TEXT_SLOT, True)):
            text = self._rendered(layout, slot)
            pieces = text.split(slot)
            images = text.count(self.family.template_token) if self.family.reads_images else 0
            if len(pieces) == layout.count(TEXT) + 1 and images == layout.count(IMAGE):
                return Template(tuple(pieces), strips)
        given = repr(text.replace(TEXT_SLOT, "{question}"))
        parts = "each image and text of a question" if self.family.reads_images else "the question"
        raise UserError(f"the tokenizer's chat template must place {parts} once; it gave "
                        f"{given[:200]}{' ...' if len(given) > 200 else ''}")  # fmt: skip

    def _rendered(self, layout: str, slot: str) -> str:
        """A user's message of this layout, with `slot` for each text, and the beginning of the answer."""
        if not self.tokenizer.chat_template:
            image = self.family.plain_image or self.family.template_token
            return f"{self._start()}User: {''.join(image if part == IMAGE else slot for part in layout)}\nAssistant: "
        content: Any = slot  # text-only templates take no list of parts
        if self.family.reads_images:
            content = [{"type": "image"} if part == IMAGE else {"type": "text", "text": slot} for part in layout]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        try:
            template = FIXED_DATE + self.tokenizer.get_chat_template()
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # of jinja2, or any that the template itself raises
            raise UserError(f"the tokenizer's chat template fails: {first_line(error)}") from error

    def _start(self) -> str:
        """The token that the tokenizer itself puts before a text, which some models need; most have none."""
        start = self.tokenizer.bos_token_id
        return str(self.tokenizer.bos_token) if start is not None and start in self.tokenizer("")["input_ids"] else ""


def _joined(pieces: list[str], texts: list[str]) -> tuple[list[str], list[str]]:
    """Move the borders between pieces and texts out of runs of newlines, which can be one token. Blank texts vanish."""
    joined, kept = [pieces[0]], []
    for text, after in zip(texts, pieces[1:], strict=True):
        if text.startswith("\n"):
            before = joined[-1].rstrip("\n")
            text, joined[-1] = joined[-1][len(before) :] + text, before
        if text.endswith("\n"):
            rest = after.lstrip("\n")
            text, after = text + after[: len(after) - len(rest)], rest
        if text:
            kept.append(text)
            joined.append(after)
        else:
            joined[-1] += after
    return joined, kept
