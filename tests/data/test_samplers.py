"""The data order: every domain in every window, every chain once an epoch, a pure function of (seed, step)."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reweighting.data.chains import Chain
from reweighting.data.samplers import ChainSampler, EpochStream, QuestionSampler, WindowSampler
from reweighting.errors import UserError


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    more=st.integers(0, 9),
    batch_size=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_windows(sizes, more, batch_size, seed):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    members = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    slots = len(sizes) + more
    samplers = [ChainSampler(chains, batch_size, seed, domain) for domain, chains in enumerate(members)]
    sampler = WindowSampler(samplers, slots, seed)
    windows = 2 * len(sizes)
    draws = [sampler.draw(step) for step in range(windows * slots)]

    per_domain: Counter[int] = Counter()
    seen: list[list[int]] = [[] for _ in sizes]
    for window in range(windows):
        domains = [domain for domain, _ in draws[window * slots : (window + 1) * slots]]
        assert set(domains) == set(range(len(sizes)))
        assert max(Counter(domains).values()) - min(Counter(domains).values()) <= 1
        per_domain.update(domains)
    assert max(per_domain.values()) == min(per_domain.values())  # over 2 K windows the extras even out
    numbers: Counter[int] = Counter()
    for window in range(windows):  # within a window the order is shuffled, but numbers never repeat or skip
        batches: dict[int, list[list[int]]] = {}
        for domain, chains in draws[window * slots : (window + 1) * slots]:
            assert set(chains) <= set(members[domain])
            batches.setdefault(domain, []).append(chains)
        for domain, found in batches.items():
            expected = [samplers[domain].draw(numbers[domain] + j) for j in range(len(found))]
            assert sorted(found) == sorted(expected)
            numbers[domain] += len(found)
            seen[domain] += [chain for batch in expected for chain in batch]
    for domain, chains in enumerate(seen):
        size = sizes[domain]
        for epoch in range(len(chains) // size):
            assert sorted(chains[epoch * size : (epoch + 1) * size]) == members[domain]

    again = WindowSampler(samplers, slots, seed)
    for step in reversed(range(len(draws))):  # any order, any start
        assert again.draw(step) == draws[step]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(classes=st.lists(st.sampled_from("abc"), min_size=1, max_size=60), seed=st.integers(0, 5))
def test_every_stretch_of_an_epoch_holds_each_class_in_its_share(classes, seed):
    stream = EpochStream(len(classes), seed, classes=classes)
    for epoch in range(2):
        order = stream.batch(epoch, len(classes))
        assert sorted(order) == list(range(len(classes)))
        for start in range(0, len(classes), 8):
            stretch = Counter(classes[i] for i in order[start : start + 8])
            for name, count in Counter(classes).items():
                expected = count * min(8, len(classes) - start) / len(classes)
                assert abs(stretch[name] - expected) < 2
    assert stream.batch(0, len(classes)) == EpochStream(len(classes), seed, classes=classes).batch(0, len(classes))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    answers=st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=60),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_updates_hold_whole_questions_and_all_of_them_in_turn(answers, batch_size, seed):
    chains = [Chain(f"question {number}", ("a",), label=float(right)) for number, right in answers]
    sampler = QuestionSampler(chains, range(len(chains)), batch_size, seed)
    assert sorted(index for answers in sampler.questions for index in answers) == list(range(len(chains)))
    of = {index: number for number, answers in enumerate(sampler.questions) for index in answers}
    drawn = []
    for update in range(-(-len(sampler.questions) // sampler.size)):
        batch = sampler.draw(update)
        drawn += batch
        numbers = Counter(of[index] for index in batch)
        assert all(count % len(sampler.questions[n]) == 0 for n, count in numbers.items())  # whole questions
    assert set(drawn) == set(range(len(chains)))
    for answers in sampler.questions:
        assert len({chains[index].question for index in answers}) == 1 and len(answers) <= batch_size
    counts = Counter(chain.question for chain in chains)
    if max(counts.values()) <= batch_size:
        assert len(sampler.questions) == len(counts)


def test_a_question_of_many_answers_is_cut_into_parts_with_right_and_wrong_ones():
    chains = [Chain("q", ("a",), label=float(number % 2)) for number in range(8)]
    sampler = QuestionSampler(chains, range(8), 4, 1)
    for update in range(4):
        assert sorted(chains[index].label for index in sampler.draw(update)) == [0, 0, 1, 1]


def test_answers_without_labels_stay_together_too():
    chains = [Chain(f"question {number % 4}", (f"answer {number}",)) for number in range(12)]
    sampler = QuestionSampler(chains, range(4, 12), 4, 1)
    drawn = [sampler.draw(number) for number in range(2)]
    assert sorted(drawn[0] + drawn[1]) == list(range(4, 12))
    assert all(len({index % 4 for index in batch}) == 2 for batch in drawn)


def test_streams_differ_by_key():
    batches = {tuple(EpochStream(50, *key).batch(0, 50)) for key in ((1, 1), (1, 2), (2, 1))}
    assert len(batches) == 3


def test_a_window_too_small_is_refused():
    with pytest.raises(UserError, match="--unroll_steps x --gradiant_accumulation = 2 .* at least 3"):
        WindowSampler([ChainSampler([domain], 1, 0) for domain in range(3)], 2, 0)
