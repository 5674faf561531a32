"""The score head: from the backbone's last hidden state h [D] at a step's last token to the step's logit.

    linear              w · h + b from a small random start
    token               (W[right] - W[wrong]) · h, with W the generating model's output embedding: how much sooner it
                        would go on with the one answer than with the other (VisualPRM, arXiv 2503.10291, and
                        DreamPRM-1.5, arXiv 2509.05542, score so)
    linear_from_token   w · h + b from that difference and 0

Each is one nn.Linear(D, 1). That of `token` stays what it was: the backbone learns to answer, and where its input
embedding is tied to W, training the one leaves the head alone, so that a score is a function of what is saved.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from reweighting.errors import UserError
from reweighting.modeling.config import PRMConfig

OUTPUT_EMBEDDING = "lm_head.weight"  # its name in a checkpoint, behind any prefix


def random_head(hidden_size: int) -> nn.Linear:
    """A linear head that starts close to a score of one half; drawn from torch's global generator."""
    head = nn.Linear(hidden_size, 1)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def start_from_tokens(head: nn.Linear, config: PRMConfig, backbone: nn.Module, tokenizer) -> None:
    """Set a head to the logit difference of the configured answers.

    backbone: the loaded model without LM head, before adapters. Raises UserError if an answer is not one token, or the
    backbone has no output embedding.
    """
    ids = [_token_id(tokenizer, name, getattr(config, name)) for name in ("correct_token", "incorrect_token")]
    if ids[0] == ids[1]:
        raise UserError(f"--correct_token and --incorrect_token are the same: {config.correct_token!r}")
    right, wrong = _output_rows(config.backbone, backbone, ids).float()
    head.weight.copy_((right - wrong)[None])
    head.bias.zero_()


def _token_id(tokenizer, name: str, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(f"--{name} {text!r}: this tokenizer makes {len(ids)} tokens of it; an answer must be one token")
    return ids[0]


def _output_rows(name: str, backbone: nn.Module, ids: Sequence[int]) -> Tensor:
    """Rows [len(ids), D] of the output embedding. Only they are read: the whole may take gigabytes."""
    place = _find_tensor(name, OUTPUT_EMBEDDING)
    if place is not None:
        with safe_open(place[0], framework="pt") as file:
            rows = file.get_slice(place[1])
            return torch.cat([rows[index : index + 1] for index in ids])
    if getattr(backbone.config, "tie_word_embeddings", False):
        return backbone.get_input_embeddings().weight[list(ids)].cpu()
    raise UserError(
        f"the backbone {name} has no LM head ({OUTPUT_EMBEDDING}), and its input embedding does not stand in for one: "
        "--score_head token and linear_from_token need a model that generates; use --score_head linear"
    )


def _find_tensor(name: str, ending: str) -> tuple[str, str] | None:
    """File and name of the tensor whose name has this ending, in a model's safetensors files; None if there is none."""
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        for key, file in json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].items():
            if key.endswith(ending):
                return cached_file(name, file), key
        return None
    path = cached_file(name, SAFE_WEIGHTS_NAME)
    with safe_open(path, framework="pt") as file:
        return next(((path, key) for key in file.keys() if key.endswith(ending)), None)
