"""Where the images of a question stand: at its `<image>` placeholders, in order; without any, before its text.

question_parts("Compare <image> and <image>.", 2)  # ["Compare ", None, " and ", None, "."]
question_parts("How many?", 2)                      # [None, None, "How many?"]

Numbered ones, `<image 1>` as in MMMU or `<image1>` as in MATH-Vision, are the same where each image has one and the
first mentions are in order. Otherwise they are text: MATH-Vision's number the parts of a single picture.
"""

import re

from reweighting.errors import UserError

PLACEHOLDER = "<image>"
NUMBERED = re.compile(r"<image ?(\d{1,3})>")
ALLOWED = f"one `{PLACEHOLDER}` for each image, or none; write the text otherwise where it names no image"


def placeholder_problem(question: str, images: int) -> str | None:
    """Say why the placeholders of a question do not fit its images; None if they do.

    Args:
        question: the text.
        images: how many it has.
    """
    count = question.count(PLACEHOLDER)
    if count in (0, images):
        return None
    return f"found {count} `{PLACEHOLDER}` for {images} image{'' if images == 1 else 's'}, allowed: {ALLOWED}"


def place_images(question: str, images: int) -> str:
    """Return a question in its simplest form: without placeholders where all images stand before its text anyway.

    Args:
        question: the text.
        images: how many it has.

    Returns:
        The question, stripped.
    """
    question = _without_numbers(question.strip(), images)
    if images and question.count(PLACEHOLDER) == images:
        before, _, after = question.rpartition(PLACEHOLDER)
        if not without_placeholders(before):
            return after.strip()
    return question


def _without_numbers(question: str, images: int) -> str:
    """The question with numbered placeholders as plain ones, if they fit; an image's later mentions are words."""
    numbers = list(dict.fromkeys(map(int, NUMBERED.findall(question))))
    if not numbers or numbers != list(range(1, images + 1)) or PLACEHOLDER in question:
        return question
    for number in numbers:
        first, *later = re.split(f"<image ?0*{number}>", question)
        question = first + PLACEHOLDER + f"image {number}".join(later)
    return question


def without_placeholders(question: str) -> str:
    """Return a question as if it had no images, stripped."""
    return question.replace(PLACEHOLDER, "").strip()


def question_parts(question: str, images: int) -> list[str | None]:
    """Cut a question at its images.

    Args:
        question: the text.
        images: how many it has.

    Returns:
        The texts between the images, those that are not empty, with None for each image.

    Raises:
        UserError: it has placeholders, but not one for each image.
    """
    texts = question.split(PLACEHOLDER)
    if len(texts) == 1:
        return [None] * images + [question]
    if problem := placeholder_problem(question, images):
        raise UserError(f"the question does not fit its images: {problem}")
    parts: list[str | None] = [texts[0]]
    for text in texts[1:]:
        parts += [None, text]
    return [part for part in parts if part != ""]
