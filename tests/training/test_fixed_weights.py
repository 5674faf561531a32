"""--domain_weights: which files give weights of mean 1, and which are refused."""

import json

import pytest
import torch

from reweighting.errors import UserError
from reweighting.training.fixed_weights import read_domain_weights

DOMAINS = ["a", "b", "weights", "c"]


def read(path, content) -> torch.Tensor:
    path.write_text(json.dumps(content))
    return read_domain_weights(str(path), DOMAINS)


def test_weights_are_scaled_to_mean_1(tmp_path):
    wanted = torch.tensor([0.5, 0.5, 0.5, 2.5])
    plain = dict(zip(DOMAINS, (1, 1, 1, 5), strict=True))  # one of the domains is called `weights`
    assert torch.equal(read(tmp_path / "w.json", plain), wanted)
    assert torch.equal(read(tmp_path / "w.json", plain | {"another": -3}), wanted)
    assert torch.equal(read(tmp_path / "w.json", {"weights": plain, "step": 10}), wanted)
    assert torch.equal(read(tmp_path / "w.json", plain | {"a": 0}), torch.tensor([0, 4 / 7, 4 / 7, 20 / 7]))


@pytest.mark.parametrize(
    "values",
    [(-1, -1, -1, -5), (1, 1, 1, -1), (-1, 1, 0, 0), (0, 0, 0, 0), (1, 1, 1, float("nan")), (1, 1, 1, float("inf"))],
)
def test_weights_below_0_or_all_0_are_refused(tmp_path, values):
    """Divided by their mean, negative numbers only would be positive ones."""
    with pytest.raises(UserError, match="w.json: weights must be at least 0"):
        read(tmp_path / "w.json", dict(zip(DOMAINS, values, strict=True)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": 1, "b": 1}, "the domain 'weights' has no weight"),
        ({"weights": {"a": 1}}, "the domain 'b' has no weight"),
        ([1, 2], "expected {domain: weight}"),
        (dict.fromkeys(DOMAINS, "x"), "expected {domain: weight}"),
        (dict.fromkeys(DOMAINS, [1]), "expected {domain: weight}"),
        (None, "expected {domain: weight}"),
    ],
)
def test_what_are_no_weights_is_refused(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        read(tmp_path / "w.json", content)
