"""The states of the random generators, saved with a run and restored when it resumes."""

import random
from typing import Any

import numpy as np
import torch

from reweighting.distributed import collectives

NUMPY_WORDS = 624  # of its Mersenne Twister's state; the position counts them


def random_states() -> dict[str, Any]:
    """Read the states of python's, numpy's and torch's random generators, in types that load safely."""
    legacy_state = np.random.get_state(legacy=True)
    assert isinstance(legacy_state, tuple)  # a dictionary only for generators other than the Mersenne Twister
    kind, keys, position, has_gauss, gauss = legacy_state
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        # Of several processes, each has a GPU of its own and leaves the others' alone.
        several = collectives.world_size() > 1
        state["cuda"] = [torch.cuda.get_rng_state()] if several else torch.cuda.get_rng_state_all()
    return state


def set_random_states(state: dict[str, Any]) -> None:
    """Set the generators to what `random_states` gave."""
    random.setstate(_python(state))
    np.random.set_state(_numpy(state))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        if collectives.world_size() > 1:
            torch.cuda.set_rng_state(state["cuda"][0])
        elif torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all(state["cuda"])


def check_random_states(state: dict[str, Any]) -> None:
    """Try out what `random_states` gave on generators of its own, and leave the global ones alone.

    Raises:
        Exception: of one of many kinds, if no generator can have such a state.
    """
    random.Random().setstate(_python(state))
    position = state["numpy"][2]
    if not 0 <= position <= NUMPY_WORDS:  # numpy does not check it
        raise ValueError(f"numpy's generator has no position {position}")
    np.random.RandomState().set_state(_numpy(state))
    torch.Generator().set_state(state["torch"])


def _python(state: dict[str, Any]) -> tuple:
    version, internal, gauss = state["python"]
    return version, tuple(internal), gauss


def _numpy(state: dict[str, Any]) -> tuple:
    kind, keys, *rest = state["numpy"]
    return kind, keys.numpy().astype(np.uint32), *rest


def own_random_states(states: list[dict[str, Any]]) -> None:
    """Set the generators of this process from those of all processes that saved them.

    As many processes as then: each takes its own. Otherwise process 0 takes those of process 0, and the others get new
    ones, so that no two have the same dropout.

    Args:
        states: from `random_states`, one of each process, by rank.
    """
    rank = collectives.rank()
    known = len(states) == collectives.world_size()
    set_random_states(states[rank if known else 0])
    if rank and not known:
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
