"""A small random model of each family, on disk as on the hub: the generating class, the family's own tokenizer and
image processor (none for `TEXT_FAMILIES`, five kinds of text-only models), and a chat template that gives what the
published one gives. Downloads nothing.

    folder = tiny_family("gemma3")      # built once per process
    processor = real_processor("gemma3")  # transformers' own, to compare with
"""

import atexit
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from reweighting.modeling.families import VISION_LANGUAGE
from tests.tiny import CHAT_TEMPLATE, MERGES, tiny_tokenizer

TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, max_position_embeddings=1024, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
            pad_token_id=None)  # fmt: skip
TEXT_FAMILIES = ("qwen2", "llama", "smollm3", "phi3", "gemma3_text")
TINY_FAMILIES = (*VISION_LANGUAGE, *TEXT_FAMILIES)
DEVICE_FAMILIES = (*VISION_LANGUAGE, "phi3")  # of a second device: text families differ in nothing that matters there
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5)
QWEN_VISION = dict(hidden_size=16, out_hidden_size=32, num_heads=2, intermediate_size=32, initializer_range=0.5)
HEAD = "{% for message in messages %}"
TAIL = "{% endfor %}{% if add_generation_prompt %}{ANSWER}{% endif %}"
TEXT_ONLY = HEAD + "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"


def template(begin: str, image: str, text: str, end: str, answer: str) -> str:
    """A chat template: a message's begin, its parts in their order, its end; then how the answer begins."""
    parts = ("{% for part in message['content'] %}{% if part['type'] == 'image' %}" + image + "{% else %}" + text
             + "{% endif %}{% endfor %}")  # fmt: skip
    return HEAD + begin + parts + end + TAIL.replace("{ANSWER}", answer)


CONTENT = "{{ message['content'] + '' }}"  # fails for a list of parts, as published text-only templates do
PART = "{{ part['text'] }}"
IM_START = "<|im_start|>{{ message['role'] }}\n"
TEMPLATES = {
    "qwen2_vl": CHAT_TEMPLATE,
    "qwen2_5_vl": CHAT_TEMPLATE,
    "qwen3_vl": template(IM_START, "<|vision_start|><|image_pad|><|vision_end|>", PART, "<|im_end|>\n",
                         "<|im_start|>assistant\n"),
    "llava_onevision": HEAD + "<|im_start|>{{ message['role'] }} "  # all images, then all texts
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}<|im_end|>"
    + TAIL.replace("{ANSWER}", "<|im_start|>assistant\n"),
    "internvl": template(IM_START, "<IMG_CONTEXT>\n", PART, "<|im_end|>\n", "<|im_start|>assistant\n"),
    "idefics3": template("<|begin_of_text|>{{ message['role'] | capitalize }}:", "<image>", PART,
                         "<end_of_utterance>\n", "Assistant:"),
    "smolvlm": template("<|im_start|>{{ message['role'] | capitalize }}{{ ':' if message['content'][0]['type'] == "
                        "'image' else ': ' }}", "<image>", PART, "<end_of_utterance>\n", "Assistant:"),
    "gemma3": template("{{ bos_token }}<start_of_turn>{{ message['role'] }}\n", "<start_of_image>",
                       "{{ part['text'] | trim }}", "<end_of_turn>\n", "<start_of_turn>model\n"),
    "qwen2": HEAD + IM_START + CONTENT + "<|im_end|>\n" + TAIL.replace("{ANSWER}", "<|im_start|>assistant\n"),
    "smollm3": "<|im_start|>system\nToday Date: {{ strftime_now('%d %B %Y') }}<|im_end|>\n" + HEAD + IM_START
               + CONTENT + "<|im_end|>\n" + TAIL.replace("{ANSWER}", "<|im_start|>assistant\n"),
    "phi3": HEAD + "<|{{ message['role'] }}|>\n" + CONTENT + "<|end|>\n" + TAIL.replace("{ANSWER}", "<|assistant|>\n"),
    "gemma3_text": "{{ bos_token }}" + HEAD + "<start_of_turn>{{ message['role'] }}\n{{ message['content'] | trim }}"
                   "<end_of_turn>\n" + TAIL.replace("{ANSWER}", "<start_of_turn>model\n"),
}  # fmt: skip
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
SPECIAL_TOKENS = {
    "llava_onevision": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"],
    "internvl": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
    "idefics3": ["<|begin_of_text|>", "<|end_of_text|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>",
                 "<global-img>", *TILES],
    "smolvlm": ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>",
                "<global-img>", *TILES],
    "llama": ["<|begin_of_text|>", "<|end_of_text|>"],
    "smollm3": ["<|end_of_text|>", "<|im_start|>", "<|im_end|>"],
    "phi3": ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "gemma3_text": ["<start_of_turn>", "<end_of_turn>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"],
}  # fmt: skip
NAMED = {  # tokens that a processor asks its tokenizer for by name
    "internvl": {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                 "video_token": "<video>"},
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
}  # fmt: skip


def tokenizer_of(family: str):
    """A tokenizer of the class that the family's checkpoints have, with their special tokens and chat template."""
    if family.startswith("qwen"):
        tokenizer = tiny_tokenizer()
    else:
        special, named = SPECIAL_TOKENS[family], {"extra_special_tokens": NAMED.get(family, {})}
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate([*letters, *(m.replace(" ", "") for m in MERGES), *special])}
        merges = [tuple(merge.split()) for merge in MERGES]
        if family.startswith("gemma3"):  # newlines merge, also those of an image's ends with the template's
            bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
            names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *bytes_, *map(chr, range(32, 127)), "▁", "\n"]
            names += ["\n\n", "\n\n\n", "th", "the", *special]
            merges = [("\n", "\n"), ("\n\n", "\n"), ("t", "h"), ("th", "e")]
            tokenizer = GemmaTokenizer({name: i for i, name in enumerate(names)}, merges, **named)
        elif family in ("idefics3", "llama"):
            model = Tokenizer(models.BPE(vocabulary, merges))
            model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token=special[0], eos_token=special[1])
            if family == "llama":  # puts a token before each text
                start = (special[0], vocabulary[special[0]])
                tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                    "<|begin_of_text|> $A", special_tokens=[start]
                )
        elif family == "smolvlm":
            tokenizer = GPT2Tokenizer(vocabulary, merges, eos_token="<end_of_utterance>")
        else:
            tokenizer = Qwen2Tokenizer(vocabulary, merges, eos_token="<|im_end|>", **named)
        tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.chat_template = TEMPLATES.get(family)
    return tokenizer


def image_processor_of(family: str):
    """The family's image processor, with images so small that they take a few tokens."""
    tile = {"height": 28, "width": 28}
    if family.startswith("qwen"):
        patch = 16 if family == "qwen3_vl" else 14
        pixels = {"shortest_edge": (4 * patch) ** 2, "longest_edge": (8 * patch) ** 2}
        return Qwen2VLImageProcessorPil(size=pixels, patch_size=patch)
    if family == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(size=tile, image_grid_pinpoints=PINPOINTS)
    if family == "internvl":
        return GotOcr2ImageProcessorPil(size=tile, max_patches=4, crop_to_patches=False)
    if family == "gemma3":
        return Gemma3ImageProcessorPil(size=tile)
    kind = Idefics3ImageProcessorPil if family == "idefics3" else SmolVLMImageProcessorPil
    return kind(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})


PINPOINTS = [[28 * rows, 28 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def config_of(family: str, tokenizer):
    """The configuration of a model with 2 decoder layers of width 32 and 1 or 2 vision layers of width 16."""
    token = tokenizer.convert_tokens_to_ids
    text = TEXT | {"vocab_size": len(tokenizer)}
    if family in TEXT_FAMILIES:
        windows = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0,
                   "query_pre_attn_scalar": 16}  # fmt: skip
        options = {"llama": {"tie_word_embeddings": True}, "gemma3_text": windows}.get(family, {})
        return AutoConfig.for_model(family, **text | options)
    siglip = VISION | {"model_type": "siglip_vision_model", "image_size": 28}
    if family.startswith("qwen"):
        mrope = {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [2, 3, 3]}
        options = {
            "qwen2_vl": dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, initializer_range=0.5),
            "qwen2_5_vl": QWEN_VISION | dict(depth=2, window_size=56, fullatt_block_indexes=[1]),
            "qwen3_vl": QWEN_VISION | dict(depth=2, num_position_embeddings=16, deepstack_visual_indexes=[0]),
        }
        name = {"qwen2_vl": "Qwen2VLConfig", "qwen2_5_vl": "Qwen2_5_VLConfig", "qwen3_vl": "Qwen3VLConfig"}[family]
        return getattr(transformers, name)(
            text_config=text | {"rope_parameters": mrope},
            vision_config=options[family],
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
        )
    if family == "llava_onevision":
        return transformers.LlavaOnevisionConfig(
            text_config=text | {"model_type": "qwen2"},
            vision_config=siglip | {"patch_size": 14, "vision_use_head": False},
            image_token_index=token("<image>"),
            video_token_index=token("<video>"),
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio="anyres_max_4",
        )
    if family == "internvl":
        return transformers.InternVLConfig(
            text_config=text | {"model_type": "qwen2"},
            vision_config=VISION | {"image_size": [28, 28], "patch_size": [7, 7]},
            image_token_id=token("<IMG_CONTEXT>"),
            image_seq_length=4,
        )
    if family == "gemma3":
        return transformers.Gemma3Config(
            text_config=text | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"],
                                "query_pre_attn_scalar": 16, "pad_token_id": 0},
            vision_config=siglip | {"patch_size": 7, "vision_use_head": False},
            mm_tokens_per_image=4,
            image_token_index=token("<image_soft_token>"),
            boi_token_index=token("<start_of_image>"),
            eoi_token_index=token("<end_of_image>"),
        )  # fmt: skip
    kind = transformers.Idefics3Config if family == "idefics3" else transformers.SmolVLMConfig
    return kind(
        text_config=text | {"model_type": "llama"},
        vision_config=VISION | {"image_size": 28, "patch_size": 7},
        image_token_id=token("<image>"),
        scale_factor=2,
    )


@functools.cache
def tiny_family(family: str) -> Path:
    """The folder of a tiny model of the family (a `model_type`), built once per process and removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = tokenizer_of(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = AutoModelForCausalLM if family in TEXT_FAMILIES else AutoModelForImageTextToText
        model = kind.from_config(config_of(family, tokenizer))
        for name, parameter in model.named_parameters():
            if "mm_input_projection_weight" in name:  # zero at the start: the image would say nothing
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    if family not in TEXT_FAMILIES:
        image_processor_of(family).save_pretrained(folder)
    if family == "llava_onevision":  # as published: the tokenizer's template knows no images, the processor's does
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": tokenizer.chat_template}))
        tokenizer.chat_template = TEXT_ONLY
        tokenizer.save_pretrained(folder, save_jinja_files=False)
    else:
        tokenizer.save_pretrained(folder)
    return folder


PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "internvl": "InternVLProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
    "gemma3": "Gemma3Processor",
}


def real_processor(family: str):
    """Transformers' own processor of the family, but for videos, for which torchvision would be needed."""
    kind = getattr(transformers, PROCESSORS[family])
    if family == "smolvlm":  # num2words writes out numbers of frames
        sys.modules[kind.__module__].num2words = str
    without_videos = type(
        kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])}
    )
    folder = tiny_family(family)
    options = {"smolvlm": {"image_seq_len": 4}, "idefics3": {"image_seq_len": 4}, "internvl": {"image_seq_length": 4},
               "gemma3": {"image_seq_length": 4}, "llava_onevision": {"num_image_tokens": 4, "vision_aspect_ratio":
               "anyres_max_4", "vision_feature_select_strategy": "full"}}  # fmt: skip
    parts = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    more = {} if family in ("gemma3", "idefics3") else {"video_processor": None}
    return without_videos(*parts, **more, chat_template=TEMPLATES[family], **options.get(family, {}))
