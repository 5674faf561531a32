"""Check what callers of the Python API give to a reward model, so that each mistake has one clear error."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from reweighting.errors import UserError
from reweighting.out_of_memory import is_out_of_memory
from reweighting.terminal import first_line


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


def check_image(image: object) -> str | Path | Image.Image | None:
    """Check the kind of an image; whether it can be read is seen when it is opened.

    Args:
        image: what the caller gave.

    Returns:
        The image.

    Raises:
        TypeError: it is no path, no PIL image and not None.
    """
    if image is None or isinstance(image, str | Path | Image.Image):
        return image
    raise TypeError(f"image: expected a path, a PIL image or None, found {type(image).__name__}")


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
