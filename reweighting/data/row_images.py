"""The images that the rows of a file name: each is found and checked once."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from reweighting.data.image_store import ImageStore, default_folder
from reweighting.data.images import FORMATS, check_images
from reweighting.data.row_files import short_repr
from reweighting.errors import UserError

ROWS_AT_A_TIME = 256  # whose images are checked together
IMAGES_DECODED = 10_000  # of a file; of the others only the headers are read (`chain_checks.py`)
ALLOWED = f"allowed: an image ({', '.join(FORMATS)}), or null"

AnyRow = TypeVar("AnyRow")


class Reference(NamedTuple):
    """What a row has in the place of an image.

    Attributes:
        path: where to look for it.
        is_stored: whether the row held the image itself, which is now at that path.
        problem: why it is no image, as the text for a message.
    """

    path: str
    is_stored: bool = False
    problem: str | None = None


class FoundImage(NamedTuple):
    """An image of a row.

    Attributes:
        name: where it was looked for.
        file: its file, symlinks resolved; None if there is none that can be read.
        problem: why there is none, as a kind and a text for a message.
    """

    name: str
    file: Path | None
    problem: tuple[str, str] | None


class RowImages:
    """Finds the files of a source's images.

    Args:
        folder: where relative paths start.
        root: the folder that all images must be in, from `image_root_folder`; None: `folder`, then the working folder.
        decode: whether to decode them, or only to see whether they are there.
        remember: check an image once, wherever in the file it is named; else it may be checked again, and memory does
            not grow with the number of images.
    """

    def __init__(self, folder: Path, root: Path | None, decode: bool = True, remember: bool = True):
        self.folder, self.root, self.decode, self.remember = folder, root, decode, remember
        self.store = ImageStore(default_folder())
        self._found: dict[str, tuple[Path | None, str]] = {}

    def references(self, images: Iterable[Any]) -> list[Reference]:
        """Return what `find` takes for the images of a row; bytes become files here, so that no row keeps them.

        Args:
            images: what stands in the row, as `ImageStore.reference` takes it.
        """
        found = []
        for image in images:
            try:
                path = self.store.reference(image)
                found.append(Reference(str(path), isinstance(path, Path)))
            except ValueError as error:
                found.append(Reference("", problem=f"found {short_repr(image)}, allowed: {error}"))
        return found

    def find(self, rows: Iterable[tuple[AnyRow, Sequence[Reference]]]) -> Iterator[tuple[AnyRow, list[FoundImage]]]:
        """Find the images of rows, a block of rows at a time.

        Args:
            rows: each row with its references.

        Yields:
            Each row with a FoundImage for each of its references.
        """
        stream = iter(rows)
        while block := list(islice(stream, ROWS_AT_A_TIME)):
            self._check([references for _, references in block])
            for row, references in block:
                yield row, [self._result(reference) for reference in references]

    def _check(self, rows: Sequence[Sequence[Reference]]) -> None:
        """Look at the images that are new in a block of rows."""
        if not self.remember:
            self._found.clear()
        new = {one for row in rows for one in row if one.problem is None and one.path not in self._found}
        decode = self.decode and len(self._found) < IMAGES_DECODED
        for stored, root in ((False, self.root), (True, None)):  # what the row held may be in any folder
            names = [one.path for one in new if one.is_stored is stored]
            self._found.update(check_images(names, self.folder, root, decode))

    def _result(self, reference: Reference) -> FoundImage:
        if reference.problem is not None:
            return FoundImage(reference.path, None, ("image", reference.problem))
        file, problem = self._found[reference.path]
        if not problem:
            return FoundImage(reference.path, file, None)
        # What the decoder says of a damaged file is different for each.
        kind = problem.partition(" (")[0]
        text = f"found {short_repr(reference.path)}, which {problem}, {ALLOWED}"
        return FoundImage(reference.path, None, (kind, text))


def image_root_folder(image_root: str | Path | None) -> Path | None:
    """Return the folder that --image_root names, symlinks resolved.

    Raises:
        UserError: there is no such folder.
    """
    if image_root is None:
        return None
    if not os.path.isdir(image_root):
        raise UserError(f"image_root {image_root}: no such folder. Name the folder of the images.")
    return Path(os.path.realpath(image_root))
