"""What training the published models would take: the README's table, from their configs alone.

    python benchmarks/memory_table.py        # minutes; loads nothing

The configs are those of the models' `config.json` on the Hugging Face hub (Qwen/Qwen2-VL-2B-Instruct,
Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen2.5-VL-72B-Instruct), written down here since the hub is not read; the parameter
counts that come out are printed beside the known ones.
"""

import argparse
from dataclasses import replace
from types import SimpleNamespace

import torch
from common import write_results
from transformers import AutoModel, Qwen2_5_VLConfig, Qwen2VLConfig

from reweighting.modeling.adapters import add_adapters
from reweighting.modeling.collate import Batch, Tokens
from reweighting.modeling.config import PRMConfig
from reweighting.modeling.fake_tensors import on_shapes
from reweighting.modeling.families.qwen_vl import QwenVL
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.training.memory_estimate import MemoryScenario, estimate

IMAGE, TEXT, STEPS = 324, 700, 5  # tokens of an image of 504 x 504, of question and answer; steps of the answer
BATCH, SETTING = 2, MemoryScenario(steps=5, micro_batches=3, meta_batches=4)  # 15 domains, 8 meta chains
RANK, GPUS, SPARE = 16, (24, 48, 80), 0.9  # of a GPU's memory: the rest is CUDA's and lost to fragmentation
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def text(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int) -> dict:
    """The language model's config; heads: of keys and values there are `kv`."""
    return dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads={1536: 2, 3584: 4, 8192: 8}[hidden],
                vocab_size=vocabulary, max_position_embeddings=32768, rope_parameters=MROPE)  # fmt: skip


def vision(hidden: int) -> dict:
    """Qwen2.5-VL's vision tower, up to the language model's width."""
    return dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=hidden,
                fullatt_block_indexes=[7, 15, 23, 31], window_size=112, patch_size=14)  # fmt: skip


MODELS = {  # name -> (config, published parameters with the LM head, in billions)
    "Qwen2-VL-2B": (
        Qwen2VLConfig(
            text_config=text(1536, 8960, 28, 12, 151936),
            vision_config=dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4, patch_size=14),
        ),
        2.21,
    ),
    "Qwen2.5-VL-7B": (
        Qwen2_5_VLConfig(text_config=text(3584, 18944, 28, 28, 152064), vision_config=vision(3584)),
        8.29,
    ),
    "Qwen2.5-VL-72B": (
        Qwen2_5_VLConfig(text_config=text(8192, 29568, 80, 64, 152064), vision_config=vision(8192)),
        73.4,
    ),
}
SHARED = 8  # processes that --shard cuts the parameters for
TRAIN_MODES = ("full", f"full, `--shard` on {SHARED}", "LoRA", "4-bit LoRA")


def make(config, mode: str) -> ProcessRewardModel:
    """The reward model on shapes, with gradient checkpointing; the vision tower is frozen, its features known."""
    whole = mode.startswith("full")
    rank = {} if whole else {"train": "lora", "lora_rank": RANK, "lora_alpha": 2 * RANK}
    settings = PRMConfig(
        backbone="", freeze_vision=True, freeze_projector=True, load_in_4bit=mode == "4-bit LoRA", **rank
    )
    family = QwenVL(config, SimpleNamespace(convert_ids_to_tokens=str), None)
    with torch.device("meta"):
        base = AutoModel.from_config(config, dtype=torch.float32 if whole else torch.bfloat16)
        backbone = base if whole else add_adapters(base, settings)
        base.visual.requires_grad_(False)
        model = ProcessRewardModel(backbone, SimpleNamespace(family=family), settings)
    backbone.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return on_shapes(model)


def a_batch(config) -> Batch:
    """A micro-batch of answers, each with its image, whose features are known; on each process as many."""
    side = int((4 * IMAGE) ** 0.5)
    ids = torch.full((BATCH, IMAGE + TEXT), 1)
    ids[:, :IMAGE] = config.image_token_id
    here = torch.ones_like(ids)
    here[-1, -1] = 0  # answers differ in length: attention gets a mask
    tokens = Tokens(
        input_ids=ids,
        attention_mask=here,
        is_image=(ids == config.image_token_id).long(),
        images={"image_grid_thw": torch.tensor([[1, side, side]] * BATCH)},
        image_features=tuple(torch.zeros(IMAGE, config.get_text_config().hidden_size) for _ in range(BATCH)),
    )
    ends = torch.arange(STEPS).expand(BATCH, -1) + IMAGE
    here = torch.ones(BATCH, STEPS, dtype=torch.bool)
    return Batch(tokens, None, None, ends, here, here.float(), here, torch.ones(BATCH), BATCH * STEPS, ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows, counts = [], {}
    for name, (config, published) in MODELS.items():
        with torch.device("meta"):
            own = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
        head = 0 if name == "Qwen2-VL-2B" else config.text_config.hidden_size * config.text_config.vocab_size  # tied
        counts[name] = {"published": published, "with_lm_head": round((own + head) / 1e9, 3), "here": own}
        print(name, counts[name], flush=True)
        for mode in TRAIN_MODES:
            model, batch = make(config, mode), a_batch(config)
            sharded = mode.endswith(str(SHARED))
            setting = replace(SETTING, processes=SHARED if sharded else 1, sharded=sharded)
            for hypergradient in ("unrolled",) if sharded else ("unrolled", "jvp"):
                parts = vars(estimate(model, batch, batch, replace(setting, hypergradient=hypergradient)))
                fits = [size for size in GPUS if parts["total"] <= SPARE * size * 2**30]
                rows.append({"model": name, "mode": mode, "hypergradient": hypergradient, "fits": fits, **parts})
                shown = ("weights", "optimizer", "kept", "activations", "gradients", "meta_pass", "total")
                cells = " | ".join(f"{parts[part] / 1e9:.1f}" for part in shown)
                where = ", ".join(f"{size} GB" for size in fits) or "none"
                print(f"| {name} | {mode} | `{hypergradient}` | {cells} | {where} |", flush=True)
    setting = vars(SETTING) | {"batch": BATCH, "tokens": IMAGE + TEXT, "image_tokens": IMAGE, "lora_rank": RANK}
    print(write_results("memory_table", {"setting": setting, "parameters": counts, "rows": rows}))


if __name__ == "__main__":
    main()
