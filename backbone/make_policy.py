"""Make the demo's policy: the embedded backbone, taught with its LM head to answer the demo's questions in five steps.

    python backbone/make_policy.py                                  # data/policy again
    python backbone/make_policy.py --output_dir /tmp/p --steps 20   # a quick try

It learns from careless answers, of which about half are correct: it reads pictures as carelessly, and makes mistakes of
its own when drawn at temperature 1. Where a question gives its answer away, it learns to conclude with that, whatever
it read. Its pictures and texts are drawn from seeds of their own: none of the data in `data/` is seen here.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "data")]
from demo_world.solutions import Policy, Question, given_away  # noqa: E402
from make_backbone import Lessons  # noqa: E402

STEPS, BATCH, WARM_UP, LR = 600, 16, 20, 1e-3
PICTURES_PER_STEP = 4  # each picture is seen four times
GIVEN = 0.2  # share of questions with an answer given away
END = "<|im_end|>"


def answer_lesson(question: Question, rng: Random) -> tuple[str, str]:
    """A question's text, and a careless five-step answer to it."""
    question = replace(question, difficulty=1.0)
    if rng.random() < GIVEN:
        return given_away(question.text, question.answer), Policy().respond(question, rng, told=True).text
    return question.text, Policy().respond(question, rng).text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE.parent / "data" / "policy")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the optimizer")
    parser.add_argument("--seed", type=int, default=30_000, help="of pictures and texts")
    args = parser.parse_args()

    started, rng = time.time(), Random(args.seed)
    tokenizer, images = AutoTokenizer.from_pretrained(HERE), Qwen2VLImageProcessorPil.from_pretrained(HERE)
    model = Qwen2VLForConditionalGeneration.from_pretrained(HERE, dtype=torch.float32).train()
    lessons = Lessons(tokenizer, images, args.steps * PICTURES_PER_STEP, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:  # the second half ends slowly
            group["lr"] = LR * min(step / WARM_UP, 1.0, 0.02 + 2 * (args.steps - step) / args.steps)
        indices = rng.sample(range(len(lessons.questions)), BATCH)
        texts = []
        for index in indices:
            question, answer = answer_lesson(lessons.questions[index], rng)
            texts.append((question, [(answer + END, "answer")]))
        inputs, skills = lessons.collate(texts, indices)
        taught = skills[:, 1:] >= 0  # [B, T - 1]
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][taught]), inputs["input_ids"][:, 1:][taught])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
    model.half().save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    images.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
