"""A random Qwen2-VL small enough for tests, on disk as a user's backbone folder would be; downloads nothing.

    folder = tiny_backbone()                         # built once per process
    model = ProcessRewardModel.from_backbone(folder)

Its tokenizer is Qwen2's kind: bytes, a few merges, Qwen2-VL's special tokens and chat template. Images are
56 x 56: 16 patches, 4 image tokens.
"""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reweighting.modeling.saved_model import SavedModel

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# "Ċ" is a newline and "Ġ" a space in byte-level BPE. Newlines merge: that is how pieces could depend on
# their neighbours.
MERGES = ("S t", "St e", "Ste p", "Ċ Ċ", "Ġ t", "Ġt h", "Ġth e", "o n", "i n", "r e")
CHAT_TEMPLATE = (  # Qwen2-VL's, without its video branch
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def draw_cells(path: Path) -> Path:
    """Half red, half blue: an image whose place in the sequence matters. Returns its path."""
    picture = Image.new("RGB", (64, 64), "red")
    picture.paste("blue", (32, 0, 64, 64))
    picture.save(path)
    return path


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2-VL's special tokens: 256 bytes, ten merges, seven special tokens."""
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate([*vocabulary, *SPECIAL_TOKENS])},
        merges=[tuple(merge.split()) for merge in MERGES],
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build(folder: Path, *, seed: int = 0, lm_head: bool = False) -> Path:
    """Write model, tokenizer and image processor into `folder`; `lm_head`: the generating class, as on the
    hub. The same seed gives the same weights with and without it."""
    tokenizer = tiny_tokenizer()
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            initializer_range=0.2,
            rope_parameters={"rope_type": "default", "rope_theta": 30.0, "mrope_section": [2, 3, 3]},
            bos_token_id=None,
            eos_token_id=ids["<|im_end|>"],
        ),
        vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, initializer_range=0.5),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    (model if lm_head else model.model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56}).save_pretrained(folder)
    return Path(folder)


def accept_files(folder: Path) -> None:
    """Let a saved reward model have the files that it has now, as if it had been saved with them."""
    saved = SavedModel.read(folder)
    SavedModel.write(folder, saved.config, saved.base)


@functools.cache
def tiny_backbone() -> Path:
    """The folder of a tiny backbone, built once per process and removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-qwen2-vl-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build(folder)
