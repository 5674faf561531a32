"""The weights of a run, made from the flags: learned ones, all 1 at the start, or fixed ones."""

import json
from pathlib import Path

import torch
from torch import Tensor

from reweighting.bilevel.domain_weights import DomainWeights, FixedWeights, LossWeights
from reweighting.bilevel.instance_evidence import InstanceEvidence
from reweighting.bilevel.instance_weights import InstanceWeights
from reweighting.config.training import LowerConfig, TrainingConfig
from reweighting.errors import UserError
from reweighting.training.instance_results import read_instance_weights
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
    scaled = (weights / weights.mean()).float()
    if not ((weights >= 0).all() and scaled.isfinite().all() and scaled.sum() > 0):
        raise UserError(f"--domain_weights {path}: weights must be at least 0, and one of them larger")
    return scaled


def make_learned_weights(config: TrainingConfig, data: RunData) -> LossWeights:
    """Make the weights that the upper level learns, all of them 1."""
    if not config.weighs_instances:
        return DomainWeights(data.domains)  # alpha [K]
    domain_of = torch.tensor([chain.domain for chain in data.train])  # [C]
    return InstanceWeights(data.domains, domain_of, config.weighs_domains)  # beta [C], and alpha [K] for both


def make_instance_evidence(config: TrainingConfig, data: RunData) -> InstanceEvidence | None:
    """Make what the calm rule knows of single chains; None where these have no weights.

    Where domains have weights too, a chain is compared with the others of its domain.
    """
    if not config.weighs_instances:
        return None
    groups = [chain.domain if config.weighs_domains else 0 for chain in data.train]
    return InstanceEvidence(torch.tensor(groups))
