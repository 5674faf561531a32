"""Check what callers of the Python API give to a reward model, so that each mistake has one clear error."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from reweighting.data.placeholders import place_images, placeholder_problem
from reweighting.errors import UserError
from reweighting.out_of_memory import is_out_of_memory
from reweighting.terminal import first_line

AnyImage = str | Path | Image.Image
Images = AnyImage | Sequence[AnyImage] | None  # of a question


def check_text(name: str, text: object, may_be_blank: bool = False) -> str:
    """Check a text.

    Args:
        name: of the argument, for messages.
        text: what the caller gave.
        may_be_blank: whether a text without any visible character is allowed.

    Returns:
        The text.

    Raises:
        TypeError: it is no str.
        UserError: it is blank, or holds half of a surrogate pair, which is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a str, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: its character {error.start} is half of a surrogate pair, which is no text") from error
    if not may_be_blank and not text.strip():
        raise UserError(f"{name}: found a blank text, allowed: text that is not blank")
    return text


def check_texts(name: str, texts: object) -> list[str]:
    """Check several texts.

    Args:
        name: of the argument, for messages.
        texts: what the caller gave: a list, a tuple or any other iterable of str.

    Returns:
        The texts.

    Raises:
        TypeError: it is no iterable of str, or a single str.
        UserError: as `check_text`.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"{name}: expected a list of str, found {type(texts).__name__}")
    return [check_text(f"{name}[{index}]", text) for index, text in enumerate(texts)]


def check_images(image: object) -> list[AnyImage]:
    """Check the kind of a question's images; whether they can be read is seen when they are opened.

    Args:
        image: what the caller gave.

    Returns:
        The images, in order.

    Raises:
        TypeError: it is no path, no PIL image, not None, and no list of paths and PIL images.
    """
    given = list(image) if isinstance(image, list | tuple) else [] if image is None else [image]
    images = [one for one in given if isinstance(one, str | Path | Image.Image)]
    if len(images) < len(given):
        found = ", ".join(sorted({type(one).__name__ for one in given}))
        raise TypeError(f"image: expected a path, a PIL image or None, or a list of these, found {found}")
    return images


def check_question(question: object, images: int) -> str:
    """Check a question, which may be blank, where an image holds it.

    Args:
        question: what the caller gave.
        images: how many it has.

    Returns:
        The question as a chain has it.

    Raises:
        TypeError: it is no str.
        UserError: it is no text, or has placeholders, but not one for each image.
    """
    text = check_text("question", question, may_be_blank=True)
    if problem := placeholder_problem(text, images):
        raise UserError(f"question: {problem}")
    return place_images(text, images)


def check_batch_size(batch_size: object) -> int:
    """Check a number of chains.

    Args:
        batch_size: what the caller gave.

    Returns:
        The number.

    Raises:
        TypeError: it is no int.
        UserError: it is not positive.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool):
        raise TypeError(f"batch_size: expected an int, found {type(batch_size).__name__}")
    if batch_size < 1:
        raise UserError(f"batch_size: found {batch_size}, allowed: a number of at least 1")
    return batch_size


@contextmanager
def one_line_errors() -> Generator[None, None, None]:
    """Turn what a model raises while it scores into a UserError, except where memory runs out.

    The inputs have been checked, so that it comes from settings in its files that do not fit the weights.

    Raises:
        UserError: with the first line of the error.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"the model cannot compute: {first_line(error)}. Its config.json or preprocessor_config.json may be damaged"
        ) from error
