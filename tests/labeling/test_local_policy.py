"""The policy in this process: its texts against transformers' own generation, its chances, and the whole command."""

import asyncio
import json
import signal
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reweighting.errors import UserError
from reweighting.label import main
from reweighting.labeling.decoding import Decoder, Text
from reweighting.labeling.local_policy import LocalPolicy
from reweighting.labeling.policy import Sampling
from reweighting.labeling.questions import Question
from reweighting.modeling.loading import load_generator
from tests.forked import interrupt
from tests.labeling.coin_policy import CHANCE_OF_7, EIGHT, READ, SEVEN, build_coin_policy
from tests.labeling.policy_server import PolicyServer
from tests.tiny import build, draw_cells
from tests.tiny_families import TEXT_FAMILIES, real_processor, tiny_family

ROOT = Path(__file__).resolve().parents[2]
ONE = "Step 1: The numbers are 3 and 4."
TWO = f"{ONE}\n\nStep 2: So we add the 3."
PREFIXES = ["", ONE, TWO, f"{TWO}\n\nStep 3: on"]
TOKENS = 8


def question(text: str, *images: Path) -> Question:
    return Question(text, images, "7", "sums", "0", "questions.jsonl: row 0", text, text)


def policy(family: str, temperature: float = 1.0, **more) -> LocalPolicy:
    return LocalPolicy(str(tiny_family(family)), "{question}\nAnswer it.", Sampling(temperature, TOKENS), **more)


def answers(found: LocalPolicy, calls: list[tuple[Question, str, int]]) -> list[str]:
    async def ask() -> list[str]:
        async with found:
            return await asyncio.gather(*(found.complete(*call) for call in calls))

    return asyncio.run(ask())


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma3_text", "qwen2_vl", "qwen3_vl", "gemma3", "idefics3"])
def test_greedy_texts_are_those_of_generate_without_sharing(family, tmp_path):
    """Against transformers' own processor and `generate`, one whole text at a time."""
    picture = draw_cells(tmp_path / "a.png")
    is_text = family in TEXT_FAMILIES
    asked = question("How many?") if is_text else question("What is in <image>?", picture)
    found = policy(family, temperature=0.0, concurrency=3)
    texts = answers(found, [(one, prefix, 0) for one in (asked, question("3 + 4?")) for prefix in PREFIXES])
    model = load_generator(str(tiny_family(family)), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_family(family))
    processor = tokenizer if is_text else real_processor(family)
    content = "How many?\nAnswer it."
    if not is_text:
        parts = ["What is in ", None, "?\nAnswer it."]
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    for text, prefix in zip(texts, PREFIXES, strict=False):
        given = {"add_special_tokens": False} if is_text else {"images": [Image.open(picture)]}
        inputs = dict(processor(text=[f"{prompt}{prefix}"], return_tensors="pt", **given))
        length = inputs["input_ids"].shape[1]
        encoded = found._encode(asked, prefix)
        assert encoded.input_ids.tolist() == inputs["input_ids"][0].tolist()
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=sorted(found._decoder.ends))
        own = [token for token in ids[0, length:].tolist() if token not in found._decoder.ends]
        assert text == found._decode(encoded.input_ids[encoded.prompt_length :].tolist(), own)


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_a_seed_gives_the_same_texts_in_every_batch(family):
    calls = [(question(text), prefix, n) for text in ("3 + 4?", "How many?") for prefix in PREFIXES for n in range(4)]
    texts = answers(policy(family, concurrency=3, seed=5), calls)
    shuffled = Random(0).sample(range(len(calls)), len(calls))
    again = answers(policy(family, concurrency=17, seed=5), [calls[place] for place in shuffled])
    assert again == [texts[place] for place in shuffled]
    assert len(set(texts)) > 0.9 * len(texts)
    assert sum(a == b for a, b in zip(texts, answers(policy(family, seed=6), calls), strict=True)) < 0.1 * len(texts)


def test_first_tokens_are_drawn_with_the_models_probabilities():
    found = policy("llama")
    start = found._decoder.read("q", found._encode(question("3 + 4?"), ONE))
    decoder = Decoder(found._decoder.model, found._decoder.family, temperature=0.7, ends=())
    texts = decoder.add([Text(start, Random(n), limit=1) for n in range(6000)])
    counts = Counter(text.ids[0] for text in texts)

    def p_value(temperature: float) -> float:
        expected = len(texts) * (start.logits.double() / temperature).softmax(0)
        often = (expected >= 5).nonzero().flatten().tolist()
        seen, due = [counts[token] for token in often], [float(expected[token]) for token in often]
        return chisquare([*seen, len(texts) - sum(seen)], [*due, len(texts) - sum(due)]).pvalue

    assert len(texts) == 6000 and p_value(0.7) > 0.01
    assert p_value(0.8) < 1e-6


@pytest.mark.parametrize(("family", "temperature"), [("qwen2", 0.1), ("gemma3_text", 0.2)])  # the latter has windows
def test_texts_that_are_equal_so_far_are_written_once(family, temperature):
    found, written = policy(family), []
    model = found._decoder.model
    starts = [found._decoder.read("q", found._encode(question("3 + 4?"), prefix)) for prefix in PREFIXES[1:3]]
    together, alone = ([Text(start, Random(n), limit=24) for start in starts for n in range(12)] for _ in range(2))
    model.register_forward_pre_hook(lambda *call: written.append(len(call[2]["input_ids"])), with_kwargs=True)

    def write(texts: list[Text]) -> int:
        decoder = Decoder(model, found._decoder.family, temperature, ends={9})
        written.clear()
        decoder.add(texts)
        while decoder.texts:
            decoder.step()
        return sum(written)

    rows, rows_alone = write(together), sum(write([text]) for text in alone)
    assert [text.ids for text in together] == [text.ids for text in alone]
    begun = {(text.start, *text.ids[:end]) for text in alone for end in range(1, len(text.ids))}
    assert rows == len(begun) < 0.8 * rows_alone


def test_beginnings_and_images_are_read_once(tmp_path):
    found = policy("qwen2_vl", concurrency=8)
    read, seen = [], []
    found._decoder.model.register_forward_pre_hook(
        lambda module, args, inputs: read.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    found._decoder.model.base_model.visual.register_forward_pre_hook(lambda *_: seen.append(True))
    asked = question("What is in it?", draw_cells(tmp_path / "a.png"))
    answers(found, [(asked, prefix, n) for prefix in PREFIXES for n in range(8)])
    longest = len(found._encode(asked, PREFIXES[-1]).input_ids)
    beginnings = [length for rows, length in read if length > 1]
    assert sum(beginnings) <= longest and beginnings[0] > 20 and len(seen) == 1
    assert sum(rows for rows, length in read if length == 1) <= 4 * 8 * TOKENS


def test_a_beginning_is_tokenized_in_its_place(monkeypatch):
    """A tokenizer of SentencePiece's kind puts a space before a text of its own, but not behind a prompt."""
    found = policy("phi3")
    letters = [*sorted(set(map(chr, range(32, 127))) - {" "}), "▁", "\n", "<|user|>", "<|assistant|>", "<|end|>"]
    base = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    base.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    base.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = found._tokenizer.tokenizer.chat_template
    chain_tokenizer = type(found._tokenizer)(tokenizer, None, found._decoder.model.config)
    monkeypatch.setattr(found, "_tokenizer", chain_tokenizer)
    monkeypatch.setattr(found, "_special", set(tokenizer.all_special_ids))
    encoded = found._encode(question("3?"), "Step 1")
    assert tokenizer.decode(encoded.input_ids).endswith("<|assistant|>\nStep 1")
    assert found._decode(tokenizer.encode("ab"), tokenizer.encode(" c")) == " c"
    plain = found._encode(question("3?"), "a <|end|>").input_ids.tolist()
    assert tokenizer.eos_token_id not in plain[plain.index(tokenizer.convert_tokens_to_ids("<|assistant|>")) :]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Questions whose answer is 7, in the working folder."""
    monkeypatch.chdir(tmp_path)
    write([{"question": f"{n} + {7 - n}?", "ground_truth": 7, "dataset": "sums", "id": n} for n in range(20)])
    return tmp_path


def write(rows: list[dict]) -> None:
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def flags(model: Path, *more: str) -> list[str]:
    return ["questions.jsonl", "--policy", str(model), "--answers", "4", "--rollouts", "16", "--device", "cpu",
            "--max_tokens", "8", "--output_train", "train.jsonl", *more]  # fmt: skip


def rows(name: str = "train.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def test_labels_scatter_about_the_true_chances(folder, coin):
    main(flags(coin, "--output_meta", "meta.jsonl", "--output_candidates", "candidates.jsonl"))
    train = rows()
    assert train and rows("meta.jsonl") and rows("candidates.jsonl")
    found: dict[str, list[float]] = {READ: [], SEVEN: [], EIGHT: []}
    for row in train:
        assert (row["policy"], row["temperature"]) == ("coin-policy", 1.0)
        assert row["times"] == [16, 16, 1] and row["labels"][2] == float(row["final_answer_correct"])
        found[READ].append(row["labels"][0])
        found[f"\n\n{row['steps'][1]}"].append(row["labels"][1])
    for step, labels in found.items():
        chance, count = CHANCE_OF_7[step], len(labels)
        assert abs(sum(labels) / count - chance) < 3 * (chance * (1 - chance) / 16 / count) ** 0.5
        variance = sum((label - chance) ** 2 for label in labels) / count
        assert variance == pytest.approx(chance * (1 - chance) / 16, rel=0.5)


def test_killed_or_interrupted_the_same_command_gives_the_same_rows(folder, coin):
    main(flags(coin, "--store", "whole.sqlite"))
    expected = Path("train.jsonl").read_bytes()
    Path("train.jsonl").unlink()
    command = ["label.py", *flags(coin, "--concurrency", "4")]
    for number in (signal.SIGINT, signal.SIGKILL):
        before = stored()
        code, errors = interrupt(number, lambda before=before: stored() >= before + 15, *command)
        if number == signal.SIGINT:
            assert code == 130 and "interrupted; the same command resumes there" in errors
            assert "Traceback" not in errors and "Exception" not in errors
    assert 30 <= stored() < 20 * 4 * 3
    main(flags(coin, "--concurrency", "7"))
    assert Path("train.jsonl").read_bytes() == expected
    with pytest.raises(UserError, match="made with other settings .seed: 0, now 1"):
        main(flags(coin, "--seed", "1"))


def stored() -> int:
    try:
        with closing(sqlite3.connect("labels.sqlite")) as file:
            return file.execute("SELECT COUNT(*) FROM entries").fetchone()[0]
    except sqlite3.Error:  # not there yet
        return 0


def test_a_changed_model_does_not_continue_a_store(folder, coin, tmp_path):
    main(flags(coin, "--answers", "1", "--rollouts", "1"))
    other = build_coin_policy(tmp_path / "other")
    main(flags(other, "--answers", "1", "--rollouts", "1"))  # the same model in another folder
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match="made with other settings .policy_digest"):
        main(flags(other, "--answers", "1", "--rollouts", "1"))


def test_a_dry_run_writes_nothing(folder, coin, capsys):
    main(flags(coin, "--dry_run"))
    assert f"20 questions: at most {20 * 4 * (1 + 2 * 16)} calls, about " in capsys.readouterr().out
    assert sorted(file.name for file in folder.iterdir()) == ["questions.jsonl"]


@pytest.mark.parametrize(("family", "precision"), [("qwen2_vl", "fp32"), ("qwen2_vl", "bf16"), ("idefics3", "bf16")])
def test_questions_with_pictures(folder, family, precision):
    draw_cells(Path("a.png"))
    write([{"question": "How many cells?", "ground_truth": 2, "images": ["a.png"]}])
    main(
        [
            *flags(tiny_family(family), "--precision", precision),
            "--output_candidates",
            "candidates.jsonl",
            "--candidates_share",
            "0.799",
        ]
    )
    assert [row["images"] for row in rows("candidates.jsonl")] == [["a.png"]] * 4


def test_a_question_that_the_model_cannot_read_is_left_out(folder, coin, capsys):
    draw_cells(Path("a.png"))
    write([{"question": "1 + 6?", "ground_truth": 7}, {"question": "How?", "ground_truth": 7, "images": ["a.png"]},
           {"question": "long " * 1000, "ground_truth": 7}])  # fmt: skip
    main(flags(coin))
    errors = capsys.readouterr().err
    assert "2 of 3 questions left out: the policy refuses them" in errors
    assert "questions.jsonl: row 1, id 1: it has an image, and the model reads text only" in errors
    assert "questions.jsonl: row 2, id 2: " in errors and "tokens, but the model takes 1024" in errors
    assert len(rows()) == 4
    with pytest.raises(UserError, match="cannot answer the first question, questions.jsonl: row 0: it has an image"):
        write([{"question": "How?", "ground_truth": 7, "images": ["a.png"]}])
        main(flags(coin, "--store", "other.sqlite"))


def test_an_error_of_the_model_ends_the_command(folder, coin, tmp_path, caplog):
    broken = build_coin_policy(tmp_path / "broken")
    model = load_generator(str(broken), torch.float32)
    with torch.no_grad():
        model.lm_head.weight[:] = torch.nan
    model.save_pretrained(broken)
    with pytest.raises(UserError, match="--policy: the model computes NaN.* What was answered is kept"):
        main(flags(broken))
    found = LocalPolicy(str(coin), "{question}", Sampling(1.0, 8), device="cpu")
    found._decoder.read = lambda *_: [][0]

    async def ask_again() -> None:
        async with found:
            for number in range(2):
                with pytest.raises(IndexError):
                    await found.complete(question("3 + 4?"), "", number)

    asyncio.run(ask_again())
    assert not caplog.records


def test_a_model_that_cannot_answer_is_refused(folder, tmp_path):
    headless = build(tmp_path / "headless")
    with pytest.raises(
        UserError, match="a Qwen2VLModel, which has no LM head .* name a Qwen2VLForConditionalGeneration"
    ):
        main(flags(headless))
    with pytest.raises(UserError, match="there is no folder nowhere/at/all"):
        main(flags(Path("nowhere/at/all")))
    with pytest.raises(UserError, match="--device"):
        main([*flags(tiny_family("llama")), "--device", "gpu"])


@pytest.mark.parametrize("flag", ["policy_model", "timeout", "seed", "device", "precision"])
def test_flags_that_would_do_nothing_are_errors(folder, coin, flag):
    value = {"policy_model": "x", "precision": "fp32", "device": "cpu"}.get(flag, "5")
    common = ["questions.jsonl", "--output_train", "train.jsonl", f"--{flag}", value, "--policy"]
    if flag in ("policy_model", "timeout"):
        with pytest.raises(UserError, match=f"--{flag} does nothing with a policy in this process"):
            main([*common, str(coin)])
        return
    with PolicyServer() as server, pytest.raises(UserError, match=f"--{flag} does nothing with a policy on a server"):
        main([*common, server.url, "--policy_model", "adder"])


def test_one_model_in_this_process_or_several_servers(folder, coin):
    with PolicyServer() as server:
        with pytest.raises(UserError, match="only servers share the work"):
            main(["questions.jsonl", "--output_train", "train.jsonl", "--policy", server.url, str(coin)])
        with pytest.raises(UserError, match="--policy_model: name the model on the server"):
            main(["questions.jsonl", "--output_train", "train.jsonl", "--policy", server.url])


def test_a_model_whose_beginnings_cannot_be_shared_is_refused(monkeypatch):
    found = policy("qwen2")
    decoder, model, encoded = found._decoder, found._decoder.model, found._encode(question("3 + 4?"), ONE)
    decoder.check(encoded)
    forward = model.forward

    def forgets(input_ids, attention_mask, past_key_values=None, **more):  # what stands more than 3 tokens before
        if past_key_values is not None:
            attention_mask = attention_mask.clone()
            attention_mask[:, : -3 - input_ids.shape[1]] = 0
        return forward(input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **more)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", forgets)
        with pytest.raises(UserError, match="qwen2 models here: it gives other texts .* name the server as --policy"):
            decoder.check(encoded)
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda input_ids: None)
        with pytest.raises(UserError, match="qwen2 models here: .*unexpected keyword argument"):
            decoder.check(encoded)
    monkeypatch.setattr(model.config, "layer_types", ["conv", "full_attention"])
    with pytest.raises(UserError, match="qwen2 models here: they are recurrent or attend in chunks"):
        Decoder(model, decoder.family, 1.0, ())
