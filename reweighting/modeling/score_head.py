"""The score head: from the backbone's last hidden state h [D] at a step's last token to the step's logit.

    linear              w · h + b, randomly initialized
    mlp                 v · GELU(W h + c) + b with 512 hidden units, randomly initialized
    token               (W[correct] - W[incorrect]) · h, where W is the output embedding of the generating model: the
                        logit difference of the two answers (as in VisualPRM, arXiv 2503.10291, and DreamPRM-1.5,
                        arXiv 2509.05542)
    linear_from_token   w · h + b, initialized to that difference and 0

All but `mlp` are one nn.Linear(D, 1). The head of `token` is frozen, and it is a copy: where the input embedding is
tied to W, training the embedding leaves the head as it is, so that scores depend only on what is saved.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reweighting.errors import UserError
from reweighting.modeling.config import PRMConfig, ScoreHead
from reweighting.modeling.loading import weight_files

MLP_UNITS = 512
OUTPUT_EMBEDDING = "lm_head.weight"  # its name in a checkpoint, after any prefix


def random_head(kind: ScoreHead, hidden_size: int) -> nn.Module:
    """Make a head whose first scores are close to one half, drawn from torch's global generator.

    Args:
        kind: which one.
        hidden_size: D, the width of the backbone's hidden states.

    Returns:
        A module from [..., D] to [..., 1].
    """
    if kind == "mlp":
        layers = {"hidden": nn.Linear(hidden_size, MLP_UNITS), "gelu": nn.GELU(), "output": _near_zero(MLP_UNITS)}
        return nn.Sequential(OrderedDict(layers))
    return _near_zero(hidden_size)


def _near_zero(inputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, 1)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def initialize_from_tokens(
    head: nn.Linear, config: PRMConfig, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Set a head to the logit difference of the configured answers.

    Args:
        head: the head to change in place, from D to 1.
        config: names the answers (`correct_token`, `incorrect_token`) and the backbone's checkpoint.
        backbone: the loaded model without LM head, before adapters are added.
        tokenizer: the backbone's.

    Raises:
        UserError: an answer is not exactly one token, or the backbone has no output embedding.
    """
    ids = [_token_id(tokenizer, name, getattr(config, name)) for name in ("correct_token", "incorrect_token")]
    if ids[0] == ids[1]:
        raise UserError(f"--correct_token and --incorrect_token are the same: {config.correct_token!r}")
    correct, incorrect = _output_rows(config.backbone, backbone, ids).float()
    head.weight.copy_((correct - incorrect)[None])
    head.bias.zero_()


def _token_id(tokenizer: PreTrainedTokenizerBase, name: str, text: str) -> int:
    """Return the id of an answer. Raises UserError if it is not exactly one token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(f"--{name} {text!r}: {len(ids)} tokens for this tokenizer, and it must be one token")
    return ids[0]


def _output_rows(name: str, backbone: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Read rows [len(ids), D] of the output embedding, and only these: the whole may take gigabytes."""
    for path in weight_files(name):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                if key.endswith(OUTPUT_EMBEDDING):
                    rows = file.get_slice(key)
                    return torch.cat([rows[index : index + 1] for index in ids])
    if getattr(backbone.config, "tie_word_embeddings", False):
        return cast(nn.Embedding, backbone.get_input_embeddings()).weight[list(ids)].cpu()
    raise UserError(
        f"the backbone {name} has no LM head ({OUTPUT_EMBEDDING}), and its input embedding does not stand in for one: "
        "--score_head token and linear_from_token need a model that generates; use --score_head linear"
    )
