"""A file of candidate rows that is read several times: checked, then scored, then measured."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reweighting.data.chains import Chain, candidate_chains, step_warnings
from reweighting.data.load_rows import iterate_candidate_rows
from reweighting.data.schema import CandidateRow
from reweighting.files import digest


@dataclass(frozen=True)
class CandidateFile:
    """What the first pass over the file finds.

    Attributes:
        path: the file.
        image_root: the folder of its images, if one is named.
        questions: its rows.
        largest: the most candidates that a row has.
        images: a digest of the sizes and modification times of the rows' images.
        warnings: what is odd about how the candidates are cut into steps.
    """

    path: str
    image_root: str | None
    questions: int
    largest: int
    images: str
    warnings: tuple[str, ...]

    @classmethod
    def read(cls, path: str, image_root: str | None) -> "CandidateFile":
        """Check every row and image.

        Raises:
            UserError: for anything wrong.
        """
        questions = largest = 0
        images = hashlib.sha256()

        def chains() -> Iterator[Chain]:
            nonlocal questions, largest
            for row in iterate_candidate_rows(path, image_root):
                questions, largest = questions + 1, max(largest, len(row.candidates))
                if row.image is not None:
                    status = row.image.stat()
                    images.update(f"{row.index} {status.st_size} {status.st_mtime_ns}\n".encode())
                yield from candidate_chains(row, path)

        warnings = tuple(step_warnings(chains(), path))
        return cls(path, image_root, questions, largest, images.hexdigest(), warnings)

    def rows(self) -> Iterator[CandidateRow]:
        """Read the rows again, without decoding their images."""
        return iterate_candidate_rows(self.path, self.image_root, decode_images=False)

    def identity(self) -> dict[str, str | None]:
        """Return what tells this input from others: the file's content, and which images belong to it."""
        return {
            "input": digest(Path(self.path)),
            "image_root": str(Path(self.image_root).resolve()) if self.image_root is not None else None,
            "images": self.images,
        }
