"""A file of candidate rows that is read several times: checked, then scored, then measured."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from reweighting.data.chains import Chain, candidate_chains, step_warnings
from reweighting.data.load_answers import LoadReport
from reweighting.data.load_chains import iterate_candidates
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.schema import CandidateRow
from reweighting.data.sources import Source, identity
from reweighting.errors import UserError
from reweighting.modeling.chain_checks import check_chains
from reweighting.modeling.tokenization import ChainTokenizer


@dataclass(frozen=True)
class CandidateFile:
    """What the first pass over the file finds.

    Attributes:
        sources: where the rows stand.
        options: how they are read.
        image_root: the folder of its images, if one is named.
        questions: its rows.
        largest: the most candidates that a row has.
        images: a digest of the sizes and modification times of the rows' images.
        warnings: what has been left out, and what is odd about how the candidates are cut into steps.
        left_out: the indices of rows that are not given.
    """

    sources: list[Source]
    options: ReadingOptions
    image_root: str | None
    questions: int
    largest: int
    images: str
    warnings: tuple[str, ...]
    left_out: frozenset[int] = frozenset()

    @classmethod
    def read(cls, sources: list[Source], options: ReadingOptions, image_root: str | None) -> "CandidateFile":
        """Check every row and image.

        Raises:
            UserError: for anything wrong.
        """
        questions = largest = 0
        images, report = hashlib.sha256(), LoadReport()
        name = " ".join(source.path for source in sources)

        def chains() -> Iterator[Chain]:
            nonlocal questions, largest
            for row in iterate_candidates(sources, image_root, options, report):
                questions, largest = questions + 1, max(largest, len(row.candidates))
                for file in row.image_files:
                    status = file.stat()
                    images.update(f"{row.index} {status.st_size} {status.st_mtime_ns}\n".encode())
                yield from candidate_chains(row, name)

        odd = step_warnings(chains(), name)
        warnings = (*report.notes(), *odd)
        if not questions:
            raise UserError("\n".join([f"{name}: no answer can be used.", *warnings]))
        return cls(sources, options, image_root, questions, largest, images.hexdigest(), warnings)

    def rows(self) -> Iterator[CandidateRow]:
        """Read the rows again, without decoding their images and without those that are left out."""
        rows = iterate_candidates(self.sources, self.image_root, self.options, LoadReport(), decode_images=False)
        return (row for row in rows if row.index not in self.left_out)

    def without_too_long(self, tokenizer: ChainTokenizer) -> "CandidateFile":
        """Leave out the questions of which an answer is longer than a model takes.

        Args:
            tokenizer: the model's.

        Raises:
            UserError: an answer cannot be scored for another reason, or no question is left.
        """
        row_of: list[int] = []  # of each chain

        def chains() -> Iterator[Chain]:
            for row in self.rows():
                for chain in candidate_chains(row, self.path):
                    row_of.append(row.index)
                    yield chain

        left_out = frozenset(row_of[place] for place in check_chains(tokenizer, chains(), drop_too_long=True))
        if len(left_out) == self.questions:
            raise UserError(f"{self.path}: every question has an answer of more than {tokenizer.max_length} tokens.")
        return replace(self, questions=self.questions - len(left_out), left_out=left_out)

    @property
    def path(self) -> str:
        """The names of the files, for messages."""
        return " ".join(source.path for source in self.sources)

    def identity(self) -> dict[str, str | None]:
        """Return what tells this input from others: the file's content, and which images belong to it."""
        return {
            "input": identity(self.sources),
            "reading": str(self.options),
            "image_root": str(Path(self.image_root).resolve()) if self.image_root is not None else None,
            "images": self.images,
            **({"left out": str(sorted(self.left_out))} if self.left_out else {}),
        }
