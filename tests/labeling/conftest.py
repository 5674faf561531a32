"""What the labelling tests share."""

import pytest

from tests.labeling.coin_policy import build_coin_policy


@pytest.fixture(scope="session")
def coin(tmp_path_factory):
    """A policy whose text is the same in every job: seed, question, beginning and number determine it."""
    return build_coin_policy(tmp_path_factory.mktemp("coin") / "coin-policy")
