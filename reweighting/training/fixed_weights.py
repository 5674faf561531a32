"""The weights of a run that stay as they are: ones, or those that another run has learned."""

import json
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from reweighting.bilevel.domain_weights import FixedWeights, LossWeights
from reweighting.bilevel.instance_weights import ChainWeights, FixedChainWeights
from reweighting.config.training import LowerConfig
from reweighting.data.row_files import short_repr
from reweighting.errors import UserError
from reweighting.terminal import first_line
from reweighting.training.instance_results import COLUMNS, FILE, chain_digest
from reweighting.training.run_data import RunData


def make_fixed_weights(config: LowerConfig, data: RunData) -> LossWeights | None:
    """Make the weights that stay as they are: those of a file, or ones with --baseline; None where they are learned.

    Raises:
        UserError: if a file cannot be read, lacks a domain or a chain, or holds a negative weight.
    """
    if config.instance_weights is not None:
        return read_instance_weights(config.instance_weights, data)
    if config.domain_weights is not None:
        return FixedWeights(read_domain_weights(config.domain_weights, data.domains))
    return FixedWeights(torch.ones(len(data.domains))) if config.baseline else None


def read_domain_weights(path: str, domains: list[str]) -> Tensor:
    """Read --domain_weights.

    Returns:
        [K] with mean 1.

    Raises:
        UserError: if the file cannot be read, lacks a domain, or holds a negative weight.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(content.get("weights"), dict):  # a run's file; a plain one may have a domain of that name
            content = content["weights"]
        weights = torch.tensor([float(content[domain]) for domain in domains], dtype=torch.float64)
    except KeyError as error:
        raise UserError(f"--domain_weights {path}: the domain {error} has no weight") from error
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"--domain_weights {path}: expected {{domain: weight}}: {error}") from error
    return scaled_to_mean_1(f"--domain_weights {path}", weights, weights.mean())


def scaled_to_mean_1(where: str, weights: Tensor, mean: Tensor, negative: bool = False) -> Tensor:
    """Divide weights, float64, by their mean.

    Args:
        where: what a message calls their file.
        weights: any number of them.
        mean: of them, a scalar.
        negative: whether some may be below 0.

    Returns:
        Their quotients, float32.

    Raises:
        UserError: if a weight is negative or not finite, or the mean is not more than 0.
    """
    scaled = (weights / mean).float()
    if not (mean > 0 and scaled.isfinite().all() and (negative or (weights >= 0).all())):
        allowed = "finite, and their mean more than 0" if negative else "at least 0, and one of them larger"
        raise UserError(f"{where}: weights must be {allowed}")
    return scaled


def read_instance_weights(path: str, data: RunData) -> FixedChainWeights:
    """Read the weights of the training chains from a run's `instance_weights.parquet`.

    Returns:
        The weights; 1 is the mean of the domains' means.

    Raises:
        UserError: if it cannot be read, lacks a chain, or holds a weight that is none.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=list(COLUMNS))
        names, weights = (table.column(name).to_pylist() for name in COLUMNS)
        found = defaultdict(list)
        for name, weight in zip(names, weights, strict=True):
            found[name].append(float(weight))
    except (OSError, pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--instance_weights {path}: expected a run's {FILE}: {first_line(error)}") from error
    for same in found.values():
        same.reverse()  # chains that are alike take theirs in order
    values, missing = [], []
    for chain in data.train:
        same = found.get(chain_digest(chain, data.domains))
        if same:
            values.append(same.pop() if len(same) > 1 else same[0])
        else:
            missing.append(chain)
    if missing:
        raise UserError(
            f"--instance_weights {path}: {len(missing)} of {len(data.train)} training chains have no weight in it, "
            f"first {missing[0].source_location}, {short_repr(missing[0].question)}: name the file of a run on these"
        )
    weights = torch.tensor(values, dtype=torch.float64)  # [C]; some activations make negative ones
    domain_of = torch.tensor([chain.domain for chain in data.train])
    mean = ChainWeights(domain_of).domain_means(weights).mean()  # of the domains' means
    return FixedChainWeights(scaled_to_mean_1(f"--instance_weights {path}", weights, mean, negative=True), domain_of)
