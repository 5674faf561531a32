"""From rows to chains: a chain is one question with an image and the steps of one response.

Training, meta and best-of-N all come through here, so that a step has the same words wherever it is scored.

    chains, domains = training_chains(rows)                                     # rows -> chains
    chain_tokenizer = ChainTokenizer(tokenizer, image_processor, model.config)  # see modeling/tokenization.py
    batch = collate([chain_tokenizer.encode(chain) for chain in chains[:8]])    # chains -> batch
"""

import math
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from reweighting.errors import UserError

# "Step 3" at the beginning of a line, under any decoration: `### Step 3:`, `**Step 3**`, `> - step 3.`
STEP_MARKER = re.compile(r"^[ \t#*>_~`|(\[•–—+-]*step[ \t]*(?:[#-][ \t]*)?\d+(?![0-9a-z])", re.I | re.M)


def split_steps(text: str) -> tuple[str, list[str]]:
    """Cut a text at its `Step N` markers: (what stands before the first, the steps with their markers).

    Only a marker that begins a line counts. All pieces are stripped; "Final answer: ..." stays in the last
    step. Without a marker the whole text is the question and there are no steps.
    """
    starts = [match.start() for match in STEP_MARKER.finditer(text)]
    if not starts:
        return text.strip(), []
    bounds = [*starts, len(text)]
    return text[: starts[0]].strip(), [text[a:b].strip() for a, b in zip(bounds, bounds[1:], strict=False)]


def split_response(text: str) -> list[str]:
    """The steps of a response, at least one: text before the first marker joins the first step, and a
    response without a marker is one step."""
    opening, steps = split_steps(text)
    if not steps:
        return [opening]
    return [f"{opening}\n{steps[0]}" if opening else steps[0], *steps[1:]]


@dataclass(frozen=True)
class Chain:
    """A question, its image, and the steps of one response with what is known about them.

    targets: one per step, Monte Carlo accuracy in [0, 1], NaN where no row labels the step; empty if none.
    label:   1.0 / 0.0 if the final answer is right / wrong (meta chains), else NaN.
    domain:  index into the list of domains, -1 if none.
    rows:    indices of the rows behind the chain; for a training chain the j-th is the one that labels the
             j-th labeled step.
    source:  the file the rows came from, for error messages.
    """

    question: str
    steps: tuple[str, ...]
    image: Path | None = None
    targets: tuple[float, ...] = ()
    label: float = math.nan
    domain: int = -1
    rows: tuple[int, ...] = ()
    source: str = ""

    @property
    def prompt(self) -> tuple[str, Path | None]:
        """What is asked: the question and its image."""
        return self.question, self.image

    @property
    def num_labeled_steps(self) -> int:
        """How many of its steps have a target."""
        return sum(not math.isnan(target) for target in self.targets)

    @property
    def source_location(self) -> str:
        """Where the chain comes from, in words for a message: 'train.json: rows 3, 7'."""
        rows = f"row{'s' if len(self.rows) > 1 else ''} {', '.join(map(str, self.rows))}" if self.rows else ""
        return ": ".join(part for part in (self.source, rows) if part) or "the given chain"


def training_chains(rows: Iterable, source: str = "") -> tuple[list[Chain], list[str]]:
    """Merge training rows into chains, each row labelling exactly one step of exactly one chain.

    A row's text is `input` followed by `add`; its `accuracy` belongs to its last step. Rows of the same
    (dataset, question, image) whose steps extend each other become one chain. Where they branch, the shared
    rows go with the branch that comes first in the file; a repeated row stays a label of its own, with the
    next branch or alone, because the loss is a mean over rows. Returns (chains in file order of their first
    row, domain names sorted). `source` is the file name that later messages use. Takes time linear in the
    rows, and keeps none of them.
    """
    texts, indices, accuracies = [], array("q"), array("d")  # of each row; the rows themselves are let go
    unextended: dict[tuple, list[int]] = defaultdict(list)  # text -> its rows that no row extends yet, last one first
    known: dict[str, str] = {}  # equal texts are kept once
    asked, question, first_steps = None, "", []
    for number, row in enumerate(rows):
        if row.input != asked:  # rows of one question mostly stand together
            asked, (question, first_steps) = row.input, split_steps(row.input)
        steps = tuple(known.setdefault(step, step) for step in (*first_steps, *split_response(row.add)))
        dataset, question = known.setdefault(row.dataset, row.dataset), known.setdefault(question, question)
        texts.append((dataset, question, row.image, steps))
        indices.append(row.index)
        accuracies.append(row.accuracy)
        unextended[texts[-1]].append(number)
    for numbers in unextended.values():
        numbers.reverse()
    domains = sorted({dataset for dataset, *_ in texts})
    domain_of = {name: index for index, name in enumerate(domains)}

    next_of: dict[int, int] = {}  # row -> the row that extends it
    extends: set[int] = set()  # rows that continue another row's chain
    for number, (*place, steps) in enumerate(texts):
        prefixes = ((*place, steps[:n]) for n in range(len(steps) - 1, 0, -1))
        parent = next((p for p in prefixes if unextended.get(p)), None)
        if parent is not None:
            next_of[unextended[parent].pop()] = number
            extends.add(number)

    ordered = []
    for number in range(len(texts)):
        if number in extends:
            continue
        members = [number]
        while members[-1] in next_of:
            members.append(next_of[members[-1]])
        dataset, question, image, steps = texts[members[-1]]
        targets = [math.nan] * len(steps)
        for member in members:
            targets[len(texts[member][3]) - 1] = accuracies[member]
        places = tuple(indices[member] for member in members)
        chain = Chain(question, steps, image, tuple(targets), math.nan, domain_of[dataset], places, source)
        ordered.append((min(members), chain))
    ordered.sort(key=lambda pair: pair[0])
    return [chain for _, chain in ordered], domains


def meta_chains(rows: Iterable, source: str = "") -> tuple[list[Chain], int]:
    """Meta rows (question and response in one text) as chains with a `label`, and how many had no step.

    A row without a `Step N` marker cannot be told apart into question and response: it is left out and
    counted, for the caller to warn about. Raises UserError if what remains is empty or all of one class,
    since the meta loss would then only push every score one way.
    """
    rows = list(rows)
    chains, stepless = [], []
    for row in rows:
        question, steps = split_steps(row.input)
        if steps:
            label = float(row.true_false)
            chains.append(Chain(question, tuple(steps), row.image, (), label, -1, (row.index,), source))
        else:
            stepless.append(bool(row.true_false))
    right = sum(chain.label == 1.0 for chain in chains)
    if right in (0, len(chains)):
        rest = f"the other {len(chains)} are all {'true' if right else 'false'}" if chains else "none is left"
        raise UserError(
            f"{source or 'the meta rows'}: of {len(rows)} rows, {len(stepless)} have no `Step N` marker "
            f"({sum(stepless)} true, {len(stepless) - sum(stepless)} false) and cannot be used; {rest}. "
            "The upper level needs right and wrong responses: `input` must hold the question and then the "
            "response, each step beginning a line with `Step 1:`, `Step 2:`, ..."
        )
    return chains, len(stepless)


def candidate_chains(row, source: str = "") -> list[Chain]:
    """One chain per candidate of a best-of-N row, in the row's order."""
    question, begun = split_steps(row.input)  # a prompt may hold the first steps already
    return [
        Chain(question, (*begun, *split_response(text)), row.image, rows=(row.index,), source=source)
        for text in row.candidates
    ]
