"""The Python API: a clear error for each kind of wrong argument, threads, and the check of a run's chains."""

import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from reweighting.data.chains import Chain
from reweighting.errors import ChainTooLong, UserError
from reweighting.modeling.chain_checks import check_chains
from reweighting.modeling.reward_model import ProcessRewardModel
from tests.tiny import draw_cells, tiny_backbone

QUESTION, STEPS = "How many red cells?", ("Step 1: two", "Step 2: so 3")


@pytest.fixture(scope="module")
def model() -> ProcessRewardModel:
    torch.manual_seed(0)
    made = ProcessRewardModel.from_backbone(tiny_backbone(), max_length=300).eval()
    torch.nn.init.normal_(made.score_head.weight)
    return made


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("responses", "kind", "message"),
    [
        (["Step 1: a", " \n"], UserError, r"responses\[1\]: found a blank text"),
        (["a", ""], UserError, r"responses\[1\]: found a blank text"),
        (["a", None], TypeError, r"responses\[1\]: expected a str, found NoneType"),
        ([b"a"], TypeError, r"responses\[0\]: expected a str, found bytes"),
        ([["Step 1"]], TypeError, r"responses\[0\]: expected a str, found list"),
        (["a\ud800b"], UserError, r"responses\[0\]: its character 1 is half of a surrogate pair"),
        ("Step 1: a", TypeError, "responses: expected a list of str, found str"),
        (b"a", TypeError, "responses: expected a list of str, found bytes"),
        (None, TypeError, "responses: expected a list of str, found NoneType"),
        (7, TypeError, "responses: expected a list of str, found int"),
    ],
)
def test_responses_that_cannot_be_ranked(model, responses, kind, message):
    with pytest.raises(kind, match=message):
        model.rank(None, QUESTION, responses)


@pytest.mark.parametrize(
    ("steps", "kind", "message"),
    [
        ("", UserError, "steps: found a blank text"),
        (" \n\t", UserError, "steps: found a blank text"),
        ([], UserError, "there is no step"),
        (["a", ""], UserError, r"steps\[1\]: found a blank text"),
        (None, TypeError, "steps: expected a list of str, found NoneType"),
        (b"Step 1", TypeError, "steps: expected a list of str, found bytes"),
        (["\udfff"], UserError, "half of a surrogate pair"),
        ("Step 1: \ud83d", UserError, "half of a surrogate pair"),
    ],
)
def test_steps_that_cannot_be_scored(model, steps, kind, message):
    with pytest.raises(kind, match=message):
        model.score(None, QUESTION, steps)


@pytest.mark.parametrize("question", [None, b"Q", 7, ["Q"]])
def test_a_question_that_is_no_text(model, question):
    for call in (model.score, model.rank):
        with pytest.raises(TypeError, match="question: expected a str"):
            call(None, question, ["a"])


def test_any_iterable_of_texts_will_do_and_a_blank_question_too(model):
    responses = ["Step 1: a", "b"]
    expected = model.rank(None, QUESTION, responses)
    assert model.rank(None, QUESTION, (text for text in responses)) == expected
    assert model.rank(None, QUESTION, tuple(responses)) == expected
    assert model.score(None, QUESTION, iter(STEPS)) == model.score(None, QUESTION, STEPS)
    assert model.rank(None, "", responses) in ([0, 1], [1, 0])
    assert model.rank(None, QUESTION, []) == []


@pytest.mark.parametrize("batch_size", [0, -1, -(10**9)])
def test_a_batch_size_below_one_is_refused(model, batch_size):
    with pytest.raises(UserError, match=f"batch_size: found {batch_size}, allowed: a number of at least 1"):
        model.rank(None, QUESTION, ["a", "b"], batch_size=batch_size)
    with pytest.raises(UserError, match="batch_size"):
        model.chain_logits([Chain(QUESTION, STEPS)], batch_size)


@pytest.mark.parametrize("batch_size", [1.5, "2", None, True])
def test_a_batch_size_that_is_no_number_is_refused(model, batch_size):
    with pytest.raises(TypeError, match="batch_size: expected an int"):
        model.rank(None, QUESTION, ["a", "b"], batch_size=batch_size)


@pytest.mark.parametrize("image", [b"\x89PNG", 7, [1], torch.zeros(3, 8, 8)])
def test_an_image_of_another_kind_is_refused(model, image):
    for call in (model.score, model.rank):
        with pytest.raises(TypeError, match="image: expected a path, a PIL image or None"):
            call(image, QUESTION, ["a"])


@pytest.mark.parametrize(
    "image", [Image.new("RGB", (0, 0)), Image.new("RGB", (0, 9)), Image.new("RGB", (4000, 1)), "/no"]
)
def test_an_image_that_cannot_be_read_is_a_user_error(model, image):
    with pytest.raises(UserError, match="image") as caught:
        model.score(image, QUESTION, STEPS)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- threads


def test_threads_that_score_at_once_leave_the_model_as_it_was(tmp_path):
    """In training mode before and after, and with the scores of a single thread."""
    model = ProcessRewardModel.from_backbone(tiny_backbone(), lora_rank=2)
    image = draw_cells(tmp_path / "cells.png")
    chains = [Chain(f"{QUESTION} {n}", STEPS, (image,) * (n % 2)) for n in range(6)]
    expected = model.chain_logits(chains)[0]
    results: list[object] = []

    def score() -> None:
        try:
            results.append(model.chain_logits(chains, batch_size=1 + len(results) % 3)[0])
        except Exception as error:
            results.append(error)

    for _ in range(3):
        threads = [threading.Thread(target=score) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert model.training and model.backbone.training
    assert len(results) == 9
    for result in results:
        assert isinstance(result, torch.Tensor) and (result - expected).abs().max() <= 1e-5, result


# ---------------------------------------------------------------- the check of a run's chains


def test_chains_that_are_too_long_are_one_line_and_can_be_dropped(model, tmp_path):
    long = [Chain("Q", ("word " * 400,), rows=(n,), source="train.json") for n in range(14)]
    fine = [Chain("Q", STEPS, rows=(n + 14,), source="train.json") for n in range(3)]
    assert (
        check_chains(model.chain_tokenizer, fine) == check_chains(model.chain_tokenizer, fine, drop_too_long=True) == []
    )
    with pytest.raises(UserError) as caught:
        check_chains(model.chain_tokenizer, [*fine, *long])
    head, line = str(caught.value).split("\n")
    assert head == "14 of 17 chains cannot be used"
    assert "train.json: row 0: " in line and "tokens, but the model takes 300" in line and "and 9 more" in line
    assert check_chains(model.chain_tokenizer, [fine[0], *long, *fine[1:]], drop_too_long=True) == list(range(1, 15))
    Image.new("RGB", (4000, 1)).save(tmp_path / "thread.png")
    narrow = Chain("Q", STEPS, (tmp_path / "thread.png",), rows=(99,), source="train.json")
    with pytest.raises(UserError, match="1 of 15 chains cannot be used\ntrain.json: row 99: cannot use the image"):
        check_chains(model.chain_tokenizer, [*long, narrow], drop_too_long=True)


def test_the_length_is_that_of_the_upright_image(model, tmp_path):
    """A picture that EXIF turns has as many tokens in the check as in the run."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (28 * 20, 28)).save(tmp_path / "turned.jpg", exif=exif)
    chain = Chain("Q", STEPS, (tmp_path / "turned.jpg",))
    encoded = model.chain_tokenizer.encode(chain)
    placeholder = model.chain_tokenizer._placeholder(tmp_path / "turned.jpg", model.chain_tokenizer.family)
    assert placeholder[1] == encoded.is_image.sum()


@pytest.mark.parametrize("count", [10_000, 40_000])
def test_many_steps_are_refused_in_no_time(count):
    model = ProcessRewardModel.from_backbone(tiny_backbone())
    chain = Chain("Q", tuple(f"Step {n}: a" for n in range(count)), rows=(0,), source="train.json")
    start = time.process_time()
    with pytest.raises(ChainTooLong, match="at least 4[0-9]{4} tokens|at least 1[0-9]{4} tokens"):
        model.chain_tokenizer.check(chain)
    assert time.process_time() - start < 0.5


def test_joining_many_steps_takes_linear_time():
    """Fifty times as many steps take less than three hundred times as long: 2,500 times where it is quadratic."""
    model = ProcessRewardModel.from_backbone(tiny_backbone(), max_length=10**9)
    seconds = []
    for count in (2_000, 100_000):
        steps = tuple("a" for _ in range(count))
        model.chain_tokenizer._tokenize = lambda texts: [[1, 2] for _ in texts]  # time of the tokenizer itself
        start = time.process_time()
        tokens = model.chain_tokenizer._chain_tokens("Q", steps, ())
        seconds.append(time.process_time() - start)
        assert len(tokens[2]) == count and tokens[2][-1] == len(tokens[0]) - 1
    assert seconds[1] < 300 * max(seconds[0], 1e-3)


def test_paths_of_both_kinds_are_taken(model, tmp_path):
    image = draw_cells(tmp_path / "cells.png")
    assert isinstance(image, Path)
    assert model.score(image, QUESTION, STEPS) == model.score(str(image), QUESTION, STEPS)
