"""From rows to chains: a chain is one question with its images and the steps of one response.

Training, meta and best-of-N all come through here, so that a step has the same words wherever it is scored.

    chains, domains = training_chains(rows)                                     # rows -> chains
    chain_tokenizer = ChainTokenizer(tokenizer, image_processor, model.config)  # see modeling/tokenization.py
    batch = collate([chain_tokenizer.encode(chain) for chain in chains[:8]])    # chains -> batch
"""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reweighting.data.placeholders import place_images
from reweighting.data.steps import MAX_STEPS, first_step_number, split_answer, split_prompt, split_response
from reweighting.errors import UserError


@dataclass(frozen=True)
class Chain:
    """A question, its images, and the steps of one response with what is known about them.

    Attributes:
        question: what is asked; where it has `<image>` placeholders, the images stand there, else before it.
        images: the files of its images, in order.
        steps: the texts of the steps, [S].
        targets: Monte Carlo accuracies in [0, 1], [S], NaN where no row labels the step; empty if none is labeled.
        label: 1.0 / 0.0 if the final answer is correct / incorrect (meta chains), else NaN.
        domain: index into the list of domains, -1 if none.
        rows: indices of the rows behind the chain; for a training chain the j-th is the one that labels the j-th
            labeled step.
        source: the file the rows came from, for error messages.
        continued: how many of the first steps stood in the rows' `input`, which the response continues.
        times: how many Monte Carlo rollouts each target is the mean of, [S], NaN where that is not known; empty if it
            is known of none.
    """

    question: str
    steps: tuple[str, ...]
    images: tuple[Path, ...] = ()
    targets: tuple[float, ...] = ()
    label: float = math.nan
    domain: int = -1
    rows: tuple[int, ...] = ()
    source: str = ""
    continued: int = 0
    times: tuple[float, ...] = ()

    @property
    def prompt(self) -> tuple[str, tuple[Path, ...]]:
        """What is asked: the question and its images."""
        return self.question, self.images

    @property
    def num_labeled_steps(self) -> int:
        """How many of its steps have a target."""
        return sum(not math.isnan(target) for target in self.targets)

    @property
    def source_location(self) -> str:
        """Where the chain comes from, in words for a message: 'train.json: rows 3, 7'."""
        rows = f"row{'s' if len(self.rows) > 1 else ''} {', '.join(map(str, self.rows))}" if self.rows else ""
        return ": ".join(part for part in (self.source, rows) if part) or "the given chain"


def training_chains(rows: Iterable, source: str = "", separator: str | None = None) -> tuple[list[Chain], list[str]]:
    """Merge training rows into chains, each row labelling exactly one step of exactly one chain.

    A row's `accuracy` belongs to the last step of its `add`; `split_prompt` says what of its `input` is the question.
    Rows of the same (dataset, question, images) whose steps extend each other become one chain. Where they branch, the
    shared rows go with the branch that comes first in the file; a repeated row stays a label of its own, with the next
    branch or alone, because the loss is a mean over rows. Takes time linear in the rows' steps, and keeps no row.

    Args:
        rows: TrainingRow objects.
        source: the name of their file, for later messages.
        separator: a text that ends a step, beside the markers; see `split_response`.

    Returns:
        The chains in the order of their first rows, and the domains' names, sorted.

    Raises:
        UserError: a row has more than `MAX_STEPS` steps.
    """
    tree = _StepTree()
    nodes, indices = array("q"), array("q")  # of each row; the rows themselves are let go
    accuracies, times = array("d"), array("d")
    unextended: dict[int, list[int]] = defaultdict(list)  # node -> its rows that no row extends yet, last one first
    continued: dict[int, int] = {}  # node -> its steps that stood in `input`, where there are any
    for number, row in enumerate(rows):
        question, begun = split_prompt(row.input, [row.add])
        steps = checked_steps([*begun, *split_response(row.add, separator)], row.index, source)
        question = place_images(question, len(row.image_files))
        node = tree.insert((row.dataset, question, row.image_files), steps)
        if begun:
            continued[node] = len(begun)
        nodes.append(node)
        indices.append(row.index)
        accuracies.append(row.accuracy)
        times.append(row.times or math.nan)
        unextended[node].append(number)
    tree.complete()
    for numbers in unextended.values():
        numbers.reverse()
    domains = sorted({dataset for dataset, _, _ in tree.prompts.values()})
    domain_of = {name: index for index, name in enumerate(domains)}

    next_of: dict[int, int] = {}  # row -> the row that extends it
    extends: set[int] = set()  # rows that continue another row's chain
    for number, node in enumerate(nodes):
        while (node := tree.parents[node]) >= 0:
            if unextended.get(node):
                next_of[unextended[node].pop()] = number
                extends.add(number)
                break

    ordered = []
    for number in range(len(nodes)):
        if number in extends:
            continue
        members = [number]
        while members[-1] in next_of:
            members.append(next_of[members[-1]])
        (dataset, question, images), steps = tree.path(nodes[members[-1]])
        targets, rollouts = [math.nan] * len(steps), [math.nan] * len(steps)
        for member in members:
            step = tree.depths[nodes[member]] - 1
            targets[step], rollouts[step] = accuracies[member], times[member]
        places = tuple(indices[member] for member in members)
        begun = max(continued.get(nodes[member], 0) for member in members)
        domain = domain_of[dataset]
        chain = Chain(
            question, steps, images, tuple(targets), math.nan, domain, places, source, begun, known_times(rollouts)
        )
        ordered.append((min(members), chain))
    ordered.sort(key=lambda pair: pair[0])
    return [chain for _, chain in ordered], domains


def known_times(times: Iterable[float]) -> tuple[float, ...]:
    """Return `Chain.times` from the rollouts of each step, NaN where they are not known."""
    times = tuple(times)
    return () if all(map(math.isnan, times)) else times  # many sets have none: their chains are smaller then


class _StepTree:
    """Step sequences as paths from their prompt, so that equal beginnings are one path and compared by number.

    Each prompt and each step is a node: a row's node stands for its prompt and all its steps.
    """

    def __init__(self):
        self.prompts: dict[int, tuple] = {}  # node -> prompt
        self._children: dict[tuple, int] = {}  # prompt, or (node, step) -> node
        # Of each node: the node before it (-1 before a prompt), its step ("" for a prompt), how many steps lead to it.
        self.parents, self.depths = array("q"), array("q")
        self._steps: list[str] = []

    def insert(self, prompt: tuple, steps: Iterable[str]) -> int:
        """The node of these steps behind this prompt."""
        node = self._child(prompt, -1, "")
        self.prompts.setdefault(node, prompt)
        for step in steps:
            node = self._child((node, step), node, step)
        return node

    def complete(self) -> None:
        """Let go what only `insert` needs, most of the memory, before the chains take theirs."""
        self._children.clear()

    def path(self, node: int) -> tuple[tuple, tuple[str, ...]]:
        """The prompt and the steps of a node."""
        steps = []
        while self.parents[node] >= 0:
            steps.append(self._steps[node])
            node = self.parents[node]
        return self.prompts[node], tuple(reversed(steps))

    def _child(self, key: tuple, parent: int, step: str) -> int:
        node = self._children.setdefault(key, len(self._steps))
        if node == len(self._steps):
            self.parents.append(parent)
            self.depths.append(0 if parent < 0 else self.depths[parent] + 1)
            self._steps.append(step)
        return node


def meta_chains(
    rows: Iterable, source: str = "", separator: str | None = None, *, one_class: bool = False
) -> tuple[list[Chain], int]:
    """Turn meta rows, each a question and a response in one text, into chains with a `label`.

    A row without a `Step N` marker has no known end of its question: it is left out and counted, for the caller to
    warn about.

    Args:
        rows: MetaRow objects.
        source: the name of their file, for messages.
        separator: a text that ends a step, beside the markers; see `split_answer`.
        one_class: whether all may be correct, or all incorrect, or none left.

    Returns:
        The chains, and how many rows had no step.

    Raises:
        UserError: the rest is empty or all of one class, so that the meta loss would only push every score one way;
            or a row has more than `MAX_STEPS` steps.
    """
    rows = list(rows)
    chains, stepless = [], []
    for row in rows:
        question, steps = split_answer(row.input, separator)
        if steps:
            steps = checked_steps(steps, row.index, source)
            question, label = place_images(question, len(row.image_files)), float(row.true_false)
            chains.append(Chain(question, steps, row.image_files, (), label, -1, (row.index,), source))
        else:
            stepless.append(bool(row.true_false))
    correct = sum(chain.label == 1.0 for chain in chains)
    if correct in (0, len(chains)) and not one_class:
        rest = f"the other {len(chains)} are all {'true' if correct else 'false'}" if chains else "none is left"
        raise UserError(
            f"{source or 'the meta rows'}: of {len(rows)} rows, {len(stepless)} have no `Step N` marker "
            f"({sum(stepless)} true, {len(stepless) - sum(stepless)} false) and cannot be used; {rest}. "
            "The upper level needs correct and incorrect responses: `input` must hold the question and then the "
            "response, each step beginning a line with `Step 1:`, `Step 2:`, ..."
        )
    return chains, len(stepless)


def candidate_chains(row, source: str = "") -> list[Chain]:
    """Turn a best-of-N row into one chain per candidate, in the row's order.

    Raises:
        UserError: a candidate has more than `MAX_STEPS` steps.
    """
    if row.candidate_steps is None:
        question, begun = split_prompt(row.input, row.candidates)
        responses = [[*begun, *split_response(text)] for text in row.candidates]
    else:
        question, begun, responses = row.input, [], row.candidate_steps
    question = place_images(question, len(row.image_files))
    return [
        Chain(
            question,
            checked_steps(steps, row.index, source),
            row.image_files,
            rows=(row.index,),
            source=source,
            continued=len(begun),
        )
        for steps in responses
    ]


def checked_steps(steps: Sequence[str], index: int, source: str) -> tuple[str, ...]:
    """Return the steps of a row's response.

    Raises:
        UserError: they are more than `MAX_STEPS`.
    """
    if len(steps) > MAX_STEPS:
        place = f"{source}: " if source else ""
        raise UserError(f"{place}row {index}: {len(steps)} steps, allowed: at most {MAX_STEPS}. Leave it out.")
    return tuple(steps)


def step_warnings(chains: Iterable[Chain], source: str) -> list[str]:
    """Describe what is odd about how the chains of a file are cut into steps, with counts.

    Args:
        chains: of the file `source`, as one of the functions above makes them.

    Returns:
        One line for each: answers of a single step, numbering that is not 1 to n, and answers whose first steps stand
        in `input`. An answer of which only the first step is given, as training rows have it, is not odd.
    """
    answers = single = misnumbered = continued = 0
    for chain in chains:
        answers += 1
        plain = all(step.startswith(f"Step {number}:") for number, step in enumerate(chain.steps, 1))
        if not plain:  # markers of other kinds take a hundred times longer to find
            numbers = [number for number in map(first_step_number, chain.steps) if number is not None]
            misnumbered += bool(numbers) and numbers != list(range(1, len(chain.steps) + 1))
        single += len(chain.steps) == 1 and not ((plain or numbers) and chain.targets)
        continued += chain.continued > 0
    lines = []
    if single:
        lines.append(f"{source}: {single} of {answers} answers are a single step, so their steps are not judged one by "
                     "one. Begin each step on a line of its own with `Step 1:`, `Step 2:`, ..., or name with "
                     "--step_separator what stands between them")  # fmt: skip
    if misnumbered:
        lines.append(f"{source}: the steps of {misnumbered} of {answers} answers are not numbered 1, 2, 3, ...: look "
                     "whether some of their `Step N` lines are no steps")  # fmt: skip
    if continued:
        lines.append(f"{source}: {continued} of {answers} answers continue the numbering of the steps at the end of "
                     "their `input`, which count as steps of theirs")  # fmt: skip
    return lines
