"""Make the embedded backbone: a Qwen2-VL of 1.7 M parameters, pretrained on the demo world to read and to judge.

    python backbone/make_backbone.py --output_dir first                        # reading, facts, steps: 3,800 steps
    python backbone/make_backbone.py --continue_from first --steps 900 --seed 30000      # steps again

About half an hour and ten minutes on two cores; `pretraining.json` says what was reached, on fresh pictures, and how
long it took. The pictures are drawn from seeds of their own, so none of the demo data is seen here.

The files beside this script were made by these two commands while the lessons were still changing: in the first one,
statements stood outside a chat and without the steps' titles. Running both anew has not been tried yet.

The recipe: `initializer_range` about 1/sqrt(width) and a rope base of 30 (head size 32, positions below a few
hundred); with transformers' defaults for both a model of this width stays at chance for thousands of steps. Four text
layers learn to read and not to judge; two more on top of them (`grow`) learn to judge within a few hundred steps.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
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
from lessons import VERDICTS, fact_lesson, reading_lesson, step_lesson  # noqa: E402

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LESSONS = (reading_lesson, fact_lesson, step_lesson)
STAGES = ((1.0, 0.0, 0.0), (0.3, 0.7, 0.0), (0.1, 0.1, 0.8))  # the lessons' shares, early to late
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
        # Where key and number stand in different cells, reading is harder: such pictures come twice as often.
        kinds = [*KINDS.values(), KINDS["table"], KINDS["price_tags"]]
        self.questions = [random_question(rng.choice(kinds), rng) for _ in range(pictures)]
        pixels = []
        for question in self.questions:
            picture = draw_picture(question.kind, question.entries, rng)
            pixels.append(image_processor(images=[picture], return_tensors="pt")["pixel_values"].half())
        self.pixels = torch.stack(pixels)  # [pictures, 64, patch pixels]

    def encode(self, text: str) -> list[int]:
        if text not in self.ids:
            self.ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.ids[text]

    def batch(self, shares: tuple[float, ...], indices: list[int]) -> tuple[dict, Tensor, Tensor]:
        """Model inputs; which tokens the lesson is about [B, T]; which of these are true/false words [B, T].

        shares: of each of LESSONS. indices: of the pictures.
        """
        image = f"<|vision_start|>{'<|image_pad|>' * IMAGE_TOKENS}<|vision_end|>"
        rows = []
        for index in indices:
            prompt = f"<|im_start|>user\n{image}{self.questions[index].text}<|im_end|>\n<|im_start|>assistant\n"
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            answers, verdicts = [False] * len(ids), [False] * len(ids)
            teach = self.rng.choices(LESSONS, shares)[0]
            for text, key in teach(self.questions[index], self.rng):
                tokens = self.encode(text)
                ids += tokens
                answers += [key] * len(tokens)
                verdicts += [text in VERDICTS] * len(tokens)
            rows.append((ids, answers, verdicts))
        length = max(len(ids) for ids, _, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([r[0] + [pad] * (length - len(r[0])) for r in rows])  # [B, T]
        answers = torch.tensor([r[1] + [False] * (length - len(r[1])) for r in rows])
        verdicts = torch.tensor([r[2] + [False] * (length - len(r[2])) for r in rows])
        inputs = {
            "input_ids": ids,
            "attention_mask": (ids != pad).long(),
            "mm_token_type_ids": (ids == self.token("<|image_pad|>")).int(),
            "pixel_values": self.pixels[indices].float().flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, 8, 8]] * len(indices)),
        }
        return inputs, answers, verdicts


@torch.inference_mode()
def accuracy_by_kind(model, lessons: Lessons) -> dict[str, dict[str, float]]:
    """On fresh pictures: share of read numbers, and of true/false words, that the model gets right."""
    model.eval()
    right = {name: {"reading": [], "judging": []} for name in KINDS}
    for start in range(0, len(lessons.questions), 50):
        indices = list(range(start, min(start + 50, len(lessons.questions))))
        inputs, answers, verdicts = lessons.batch((1, 0, 1), indices)
        guesses = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1) == inputs["input_ids"][:, 1:]  # [B, T - 1]
        for row, index in enumerate(indices):
            taught, judged = answers[row, 1:], verdicts[row, 1:]
            scores = right[lessons.questions[index].kind.name]
            scores["reading"] += guesses[row][taught & ~judged].tolist()
            scores["judging"] += guesses[row][judged].tolist()
    model.train()
    return {
        name: {what: round(sum(hits) / len(hits), 3) for what, hits in scores.items()} for name, scores in right.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE)
    parser.add_argument("--continue_from", type=Path, help="a backbone that has gone through the first two stages")
    parser.add_argument("--steps", type=int, default=3800, help="optimizer steps")
    parser.add_argument("--reading_steps", type=int, default=1000, help="of these, the first ones, that only read")
    parser.add_argument("--fact_steps", type=int, default=900, help="then those that judge single facts too")
    parser.add_argument("--batch_size", type=int, default=32, help="lessons in a batch")
    parser.add_argument("--pictures", type=int, default=12000, help="pictures in the pool")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=20_000, help="of pictures, texts and weights")
    args = parser.parse_args()

    started = time.time()
    rng = Random(args.seed)
    torch.manual_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if not args.continue_from:
        make_tokenizer(rng).save_pretrained(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.continue_from or args.output_dir)
    image_processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    image_processor.save_pretrained(args.output_dir)
    if args.continue_from:
        args.reading_steps = args.fact_steps = 0
        model = Qwen2VLForConditionalGeneration.from_pretrained(args.continue_from).train()
    else:
        model = make_model(tokenizer).train()
    lessons = Lessons(tokenizer, image_processor, args.pictures, rng)
    fresh = Lessons(tokenizer, image_processor, 1000, Random(args.seed + 1))
    print(f"pictures drawn after {time.time() - started:.0f} s", flush=True)

    def new_optimizer(lr: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))

    warm, decay = 100, (args.steps - args.reading_steps) // 3
    optimizer, base_lr, since = new_optimizer(args.lr), args.lr * (2 if args.continue_from else 1), 0
    for step in range(1, args.steps + 1):
        if step == args.reading_steps + 1 and not args.continue_from:
            grow(model, 2)
            optimizer, base_lr, since = new_optimizer(2 * args.lr), 2 * args.lr, args.reading_steps
        for group in optimizer.param_groups:
            group["lr"] = base_lr * min((step - since) / warm, 1.0, 0.02 + (args.steps - step) / decay)
        shares = STAGES[0] if step <= args.reading_steps else STAGES[1 + (step > args.reading_steps + args.fact_steps)]
        pictures = [lessons.rng.randrange(args.pictures) for _ in range(args.batch_size)]
        inputs, answers, verdicts = lessons.batch(shares, pictures)
        taught = answers[:, 1:]  # only the words that a lesson is about are worth their share of the time
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][taught]  # [words, D]
        words = inputs["input_ids"][:, 1:][taught]
        logits = model.lm_head(hidden)
        loss = F.cross_entropy(logits, words)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            judged, hits = verdicts[:, 1:][taught], (logits.argmax(-1) == words).float()
            print(
                f"step {step} loss {loss:.3f} reading {hits[~judged].mean():.3f} judging {hits[judged].mean():.3f} "
                f"{time.time() - started:.0f} s",
                flush=True,
            )
        if step % 500 == 0 or step == args.steps:
            model.save_pretrained(args.output_dir)
            report = {
                "steps": step,
                "continued_from": json.loads((args.continue_from / "pretraining.json").read_text())["steps"]
                if args.continue_from
                else 0,
                "seconds": round(time.time() - started),
                "parameters": model.num_parameters(),
                "seed": args.seed,
                "torch": torch.__version__,
                "accuracy": accuracy_by_kind(model, fresh),
            }
            (args.output_dir / "pretraining.json").write_text(json.dumps(report, indent=1) + "\n")
            print(json.dumps(report["accuracy"]), flush=True)


if __name__ == "__main__":
    main()
