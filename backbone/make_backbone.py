"""Make the embedded backbone: a Qwen2-VL of 1.7 M parameters, pretrained on the demo world to read and to judge.

    python backbone/make_backbone.py                                    # every file beside this script again
    python backbone/make_backbone.py --output_dir /tmp/b --scale 0.01   # a quick try

`pretraining.json` says what was reached, on fresh pictures, and how long it took. The pictures are drawn from seeds of
their own, so none of the demo data is seen here.

The recipe: `initializer_range` about 1/sqrt(width) and a rope base of 30 (head size 32, positions below a few
hundred); with transformers' defaults for both a model of this width stays at chance for thousands of steps. Four text
layers learn to read and not to judge; two more on top of them (`grow`) learn to judge within a few hundred steps.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "data"))
from demo_world.pictures import KINDS, draw_picture  # noqa: E402
from demo_world.solutions import Policy, random_kind, random_question  # noqa: E402

sys.path.insert(0, str(HERE))
from lessons import SKILLS, Piece, correcting_lesson, fact_lesson, judging_lesson, reading_lesson  # noqa: E402

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LESSONS = (reading_lesson, fact_lesson, correcting_lesson, judging_lesson)


@dataclass(frozen=True)
class Stage:
    """A part of the pretraining: its optimizer steps, the shares of LESSONS in it, its learning rate."""

    steps: int
    shares: tuple[float, ...]
    lr: float
    new_layers: int = 0  # text layers put on top at its start


STAGES = (
    Stage(900, (1.0, 0.0, 0.0, 0.0), 1e-3),
    Stage(700, (0.3, 0.7, 0.0, 0.0), 2e-3, new_layers=2),
    Stage(1500, (0.1, 0.0, 0.9, 0.0), 2e-3),
    Stage(1200, (0.05, 0.0, 0.0, 0.95), 2e-3),
)
BATCH, PICTURES, WARM_UP = 32, 12_000, 100  # lessons in a batch, pictures in the pool, steps
IMAGE_TOKENS = 16  # 112 x 112 pixels, patches of 14, merged 2 x 2


def make_tokenizer(rng: Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE on texts of the demo world; any other text falls back to bytes."""
    texts, policy = [], Policy()
    for _ in range(3000):
        question = random_question(random_kind(rng), rng)
        texts += ["".join(text for text, _ in teach(question, rng)) for teach in LESSONS]
        texts += [question.text, policy.respond(question, rng).text]
    texts += ["user\nassistant\n"] * 100 + [f"{n} {n}." for n in range(25)] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4096)
    fast.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    """The untrained model: 4 text layers of width 128 (`grow` adds 2), 3 vision layers of width 96."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "initializer_range": 0.08,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 3,
            "embed_dim": 96,
            "num_heads": 4,
            "mlp_ratio": 2,
            "hidden_size": 128,
            "patch_size": 14,
            "initializer_range": 0.1,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


def grow(model: Qwen2VLForConditionalGeneration, layers: int) -> None:
    """Add text layers at the top that do nothing yet: judging needs depth above what reading has learned to use."""
    text, width = model.model.language_model, model.config.text_config.initializer_range
    for _ in range(layers):
        layer = copy.deepcopy(text.layers[-1])
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=width)
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        layer.self_attn.layer_idx = len(text.layers)
        text.layers.append(layer)
    model.config.text_config.num_hidden_layers = len(text.layers)
    model.config.text_config.layer_types = ["full_attention"] * len(text.layers)


class Lessons:
    """An endless stream of batches of lessons over a pool of pictures."""

    def __init__(self, tokenizer, image_processor, pictures: int, rng: Random):
        self.tokenizer, self.rng, self.ids = tokenizer, rng, {}
        self.token = tokenizer.convert_tokens_to_ids
        self.questions = [random_question(random_kind(rng), rng) for _ in range(pictures)]
        pixels = []
        for question in self.questions:
            picture = draw_picture(question.kind, question.entries, rng)
            pixels.append(image_processor(images=[picture], return_tensors="pt")["pixel_values"].half())
        self.pixels = torch.stack(pixels)  # [pictures, 64, patch pixels]

    def encode(self, text: str) -> list[int]:
        if text not in self.ids:
            self.ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.ids[text]

    def batch(self, shares: tuple[float, ...], indices: list[int]) -> tuple[dict, Tensor]:
        """Model inputs of random lessons, see `collate`.

        shares: of each of LESSONS. indices: of the pictures.
        """
        texts = []
        for index in indices:
            teach = self.rng.choices(LESSONS, shares)[0]
            texts.append((self.questions[index].text, list(teach(self.questions[index], self.rng))))
        return self.collate(texts, indices)

    def collate(self, texts: list[tuple[str, list[Piece]]], indices: list[int]) -> tuple[dict, Tensor]:
        """Model inputs, and the skill that each token tests [B, T]: an index of SKILLS, or -1 if it is only context.

        texts: a question and what follows it, for each of the pictures.
        """
        image = f"<|vision_start|>{'<|image_pad|>' * IMAGE_TOKENS}<|vision_end|>"
        rows = []
        for question, pieces in texts:
            prompt = f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            skills = [-1] * len(ids)
            for text, skill in pieces:
                tokens = self.encode(text)
                ids += tokens
                skills += [SKILLS.index(skill) if skill else -1] * len(tokens)
            rows.append((ids, skills))
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])  # [B, T]
        skills = torch.tensor([skills + [-1] * (length - len(skills)) for _, skills in rows])  # [B, T]
        inputs = {
            "input_ids": ids,
            "attention_mask": (ids != pad).long(),
            "mm_token_type_ids": (ids == self.token("<|image_pad|>")).int(),
            "pixel_values": self.pixels[indices].float().flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, 8, 8]] * len(indices)),
        }
        return inputs, skills


def shares_right(hits: dict[str, list[bool]]) -> dict[str, float]:
    """{name: share of hits}, of the names that have any."""
    return {name: round(sum(found) / len(found), 3) for name, found in hits.items() if found}


@torch.inference_mode()
def accuracy(model, lessons: Lessons) -> dict[str, dict]:
    """On fresh pictures: the share of tested words that the model gets right, by skill, and by kind of picture."""
    model.eval()
    by_skill = {skill: [] for skill in SKILLS}
    by_kind = {kind: {"reading": [], "evidence": []} for kind in KINDS}
    for start in range(0, len(lessons.questions), 50):
        indices = list(range(start, min(start + 50, len(lessons.questions))))
        inputs, skills = lessons.batch((1, 0, 0, 1), indices)
        hits = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1) == inputs["input_ids"][:, 1:]  # [B, T - 1]
        for row, place in (skills[:, 1:] >= 0).nonzero().tolist():
            skill, kind = SKILLS[skills[row, place + 1]], lessons.questions[indices[row]].kind.name
            by_skill[skill].append(hits[row, place].item())
            if skill in by_kind[kind]:
                by_kind[kind][skill].append(hits[row, place].item())
    model.train()
    return {"skills": shares_right(by_skill), "kinds": {kind: shares_right(hits) for kind, hits in by_kind.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE)
    parser.add_argument("--scale", type=float, default=1.0, help="of the stages' lengths and the number of pictures")
    parser.add_argument("--seed", type=int, default=20_000, help="of pictures, texts and weights")
    args = parser.parse_args()

    started = time.time()
    rng = Random(args.seed)
    torch.manual_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(rng)
    tokenizer.save_pretrained(args.output_dir)
    image_processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    image_processor.save_pretrained(args.output_dir)
    model = make_model(tokenizer).train()
    lessons = Lessons(tokenizer, image_processor, round(PICTURES * args.scale), rng)
    fresh = Lessons(tokenizer, image_processor, 1000, Random(args.seed + 1))
    print(f"pictures drawn after {time.time() - started:.0f} s", flush=True)

    def train_on_batch(optimizer: torch.optim.Optimizer, shares: tuple[float, ...]) -> tuple[float, dict[str, float]]:
        """One optimizer step: the loss, and the share of right words by skill."""
        inputs, skills = lessons.batch(shares, lessons.rng.sample(range(len(lessons.questions)), BATCH))
        tested = skills[:, 1:] >= 0  # only the words that a lesson is about are worth their share of the time
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        words = inputs["input_ids"][:, 1:][tested]
        logits = model.lm_head(hidden[:, :-1][tested])  # [words, V]
        loss = F.cross_entropy(logits, words)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        hits, found = logits.argmax(-1) == words, skills[:, 1:][tested]
        return loss.item(), shares_right({skill: hits[found == i].tolist() for i, skill in enumerate(SKILLS)})

    for number, stage in enumerate(STAGES, start=1):
        grow(model, stage.new_layers)
        if number == 1 or stage.new_layers:
            optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, weight_decay=0.01, betas=(0.9, 0.98))
            warm = WARM_UP
        else:
            warm = 1
        steps = max(1, round(stage.steps * args.scale))
        decay = steps // 2 if stage is STAGES[-1] else steps  # the last stage ends slowly
        for step in range(1, steps + 1):
            end = 0.02 + (steps - step) / decay if stage is STAGES[-1] else 1.0
            for group in optimizer.param_groups:
                group["lr"] = stage.lr * min(step / warm, 1.0, end)
            loss, right = train_on_batch(optimizer, stage.shares)
            if step % 50 == 0:
                print(f"stage {number} step {step} loss {loss:.3f} {right} {time.time() - started:.0f} s", flush=True)
        model.save_pretrained(args.output_dir)
        print(f"stage {number} ends: {json.dumps(accuracy(model, fresh))}", flush=True)
    report = {
        "seconds": round(time.time() - started),
        "parameters": model.num_parameters(),
        "steps": [stage.steps for stage in STAGES],
        "scale": args.scale,
        "seed": args.seed,
        "torch": torch.__version__,
        "accuracy": accuracy(model, fresh),
    }
    (args.output_dir / "pretraining.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
