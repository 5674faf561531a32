"""The states of the random generators, saved with a run and restored when it resumes."""

import random

import numpy as np
import torch

from reweighting.distributed import collectives


def random_states() -> dict:
    """The states of python's, numpy's and torch's random generators, in types that load safely."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
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


def set_random_states(state: dict) -> None:
    """Set the generators to what `random_states` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        if collectives.world_size() > 1:
            torch.cuda.set_rng_state(state["cuda"][0])
        elif torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all(state["cuda"])


def own_random_states(states: list[dict]) -> None:
    """Set the generators of this process from those of all processes that saved them: its own, where there are as many
    now; else the main process goes on with its own, and the others with new ones."""
    rank = collectives.rank()
    known = len(states) == collectives.world_size()
    set_random_states(states[rank if known else 0])
    if rank and not known:
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
