"""A model on disk that answers in three steps, with known chances: what follows depends on the last token only.

Its answers are 7 and 8. One layer that adds nothing leaves the embedding, a place for each token, to the LM head, which
holds the logarithms of the chances.
"""

import math
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import tiny_tokenizer

READ = "Step 1: Read the question."
SEVEN, EIGHT = "\n\nStep 2: It is 7.", "\n\nStep 2: It is 8."
ENDS_7, ENDS_8 = "\n\nStep 3: Done.\nFinal answer: 7", "\n\nStep 3: Done.\nFinal answer: 8"
CHANCES = {
    "Ċ": {READ: 1.0},  # the end of the prompt
    READ: {SEVEN: 0.6, EIGHT: 0.4},
    SEVEN: {ENDS_7: 0.75, ENDS_8: 0.25},
    EIGHT: {ENDS_7: 0.125, ENDS_8: 0.875},
    ENDS_7: {"<|im_end|>": 1.0},
    ENDS_8: {"<|im_end|>": 1.0},
}
CHANCE_OF_7 = {READ: 0.6 * 0.75 + 0.4 * 0.125, SEVEN: 0.75, EIGHT: 0.125}  # behind these steps


def build_coin_policy(folder: Path) -> Path:
    """Write model and tokenizer into a folder."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (READ, SEVEN, EIGHT, ENDS_7, ENDS_8)])
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        scale = math.sqrt(size)  # of the place of a token behind the norm
        for token, chances in CHANCES.items():
            place = tokenizer.convert_tokens_to_ids(token)
            model.lm_head.weight[:, place] = -40 / scale
            for follows, chance in chances.items():
                model.lm_head.weight[tokenizer.convert_tokens_to_ids(follows), place] = math.log(chance) / scale
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
