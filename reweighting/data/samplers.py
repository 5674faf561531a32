"""Which chains a step reads: a pure function of (seed, step), so that a run can resume anywhere.

The lower level draws single-domain micro-batches. A window is the `slots` micro-batches between two updates of the
weights; every domain stands in every window, the first `slots % K` of a rotating order once more than the others.
Within a domain, chains (or whole questions) come in epochs, each a fresh permutation. The upper level draws whole
questions of the meta set.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

from reweighting.data.chains import Chain
from reweighting.distributed import collectives
from reweighting.errors import UserError

T = TypeVar("T")


class EpochStream:
    """An endless stream over `size` items in epochs, each a permutation of its own.

    Args:
        size: number of items.
        key: whole numbers that name this stream, among them the seed.
        classes: [size], a class for each item: every batch then holds each class in its share of the whole, to one
            item, so that batches differ less from each other. None: all items are of one class.
    """

    def __init__(self, size: int, *key: int, classes: Sequence | None = None):
        self.size, self.key = size, key
        self.classes = np.zeros(size) if classes is None else np.asarray(classes)
        self._permutation = lru_cache(maxsize=4)(self._permute)

    def _permute(self, epoch: int) -> np.ndarray:
        order = np.random.default_rng((*self.key, epoch)).permutation(self.size)
        place = np.zeros(self.size)  # of an item in its class, as a fraction of the class
        names = np.unique(self.classes)
        # The classes begin at evenly spread places: otherwise all that have a single item would stand together.
        for name, start in zip(names, (np.arange(len(names)) + 0.5) / len(names), strict=True):
            members = order[self.classes[order] == name]
            place[members] = (np.arange(len(members)) + start) / len(members)
        return order[np.argsort(place[order], kind="stable")]

    def batch(self, number: int, batch_size: int) -> list[int]:
        """Return items [number * batch_size, (number + 1) * batch_size) of the stream, as indices."""
        places = range(number * batch_size, (number + 1) * batch_size)
        return [int(self._permutation(place // self.size)[place % self.size]) for place in places]


class ChainSampler:
    """Draw batches of single chains, each chain once an epoch.

    A batch larger than the domain goes on into the next epoch, so that it repeats chains (`run_data.py` warns of it).

    Args:
        members: the indices of the chains.
        batch_size: chains in a batch.
        key: whole numbers that name this sampler, among them the seed.
    """

    def __init__(self, members: Sequence[int], batch_size: int, *key: int):
        self.members, self.batch_size, self.stream = members, batch_size, EpochStream(len(members), *key)
        self.min_batch_size = batch_size  # chains in the smallest batch

    def draw(self, number: int) -> list[int]:
        """Return the chain indices of a batch; batches count from 0."""
        return [self.members[place] for place in self.stream.batch(number, self.batch_size)]


class QuestionSampler:
    """Draw batches of whole questions: their answers can be compared, and share the pass over their prompt.

    A question with more answers than a batch is cut into parts, each with its share of the correct ones. Questions
    come in epochs, those with the same share of correct answers in their share of every batch: otherwise the sign of
    the meta gradient is partly chance.

    Args:
        chains: all chains.
        members: indices of those that are drawn from.
        batch_size: about this many chains in a batch.
        key: whole numbers that name this sampler, among them the seed.
    """

    def __init__(self, chains: Sequence[Chain], members: Sequence[int], batch_size: int, *key: int):
        answers_to = defaultdict(list)
        for index in members:
            answers_to[chains[index].prompt].append(index)
        self.questions: list[list[int]] = []
        for answers in answers_to.values():
            parts = -(-len(answers) // batch_size)
            answers.sort(key=lambda index: chains[index].label == 1)  # each part below takes every so many-th
            self.questions += [answers[part::parts] for part in range(parts)]
        self.size = min(len(self.questions), max(1, round(batch_size * len(self.questions) / len(members))))
        shares = [sum(chains[index].label == 1 for index in answers) / len(answers) for answers in self.questions]
        self.stream = EpochStream(len(self.questions), *key, classes=shares)

    @property
    def min_batch_size(self) -> int:
        """The number of chains in the smallest batch."""
        return self.size * min(map(len, self.questions))

    def draw(self, number: int) -> list[int]:
        """Return the chain indices of a batch, answers to one question together; batches count from 0."""
        return [index for place in self.stream.batch(number, self.size) for index in self.questions[place]]


def small_batches(own: Sequence[T], drawn: int, batch_size: int) -> list[Sequence[T]]:
    """Cut this process's part of a large batch into small ones, as many on every process.

    A sharded model is computed by all processes at once, so none may have fewer batches than another.

    Args:
        own: this process's items, in order.
        drawn: the number of items of all processes, at least one for each.
        batch_size: the size of a small batch, over all processes.

    Returns:
        The small batches, at least one item in each.
    """
    world = collectives.world_size()
    most = -(-drawn // world)  # items on a process
    count = min(-(-most // -(-batch_size // world)), drawn // world)
    size = -(-most // count)
    if world == 1:
        size = batch_size  # the last one smaller, not all a little
    batches, start = [], 0
    for left in range(count - 1, -1, -1):  # batches still to come
        end = min(start + size, len(own) - left)
        batches.append(own[start:end])
        start = end
    return batches


class WindowSampler:
    """Draw the chains of each micro-batch of the lower level; every domain stands in every window.

    Args:
        samplers: one for each domain's batches.
        slots: micro-batches in a window.
        seed: of the run.

    Raises:
        UserError: a window has fewer slots than there are domains.
    """

    def __init__(self, samplers: Sequence[ChainSampler | QuestionSampler], slots: int, seed: int):
        if slots < len(samplers):
            raise UserError(
                f"a window of --unroll_steps x --gradiant_accumulation = {slots} micro-batches cannot hold each of "
                f"the {len(samplers)} domains once; raise one of the two until their product is at least "
                f"{len(samplers)}"
            )
        self.samplers, self.slots, self.seed = samplers, slots, seed
        self._window = lru_cache(maxsize=2)(self._draw_window)

    def _draw_window(self, window: int) -> list[tuple[int, int]]:
        """Return the slots of a window in order: (domain, number of earlier micro-batches of that domain)."""
        domains = len(self.samplers)
        every, extra = divmod(self.slots, domains)
        slots = []
        for domain in range(domains):
            earlier_extras = len(range(domain, window * extra, domains))
            repeats = every + len(range(domain, (window + 1) * extra, domains)) - earlier_extras
            slots += [(domain, window * every + earlier_extras + i) for i in range(repeats)]
        order = np.random.default_rng((self.seed, 2, window)).permutation(len(slots))
        return [slots[i] for i in order]

    def draw(self, micro_step: int) -> tuple[int, list[int]]:
        """Return the domain and the chain indices of a micro-batch; micro-batches count from 0."""
        window, slot = divmod(micro_step, self.slots)
        domain, number = self._window(window)[slot]
        return domain, self.samplers[domain].draw(number)
