"""The weights that a run learns, made from the flags: all of them 1 at the start. `fixed_weights.py` has the others."""

import torch

from reweighting.bilevel.domain_weights import DomainWeights, LossWeights
from reweighting.bilevel.instance_evidence import InstanceEvidence
from reweighting.bilevel.instance_net import InstanceNet, known_features
from reweighting.bilevel.instance_weights import InstanceWeights, PublishedInstanceWeights
from reweighting.config.training import TrainingConfig
from reweighting.training.run_data import RunData


def make_learned_weights(config: TrainingConfig, data: RunData) -> LossWeights:
    """Make the weights that the upper level learns, all of them 1."""
    if not config.weighs_instances:
        return DomainWeights(data.domains)  # alpha [K]
    domain_of = torch.tensor([chain.domain for chain in data.train])  # [C]
    if config.upper.instance_activation != "softplus":
        return PublishedInstanceWeights(domain_of, config.upper.instance_activation)  # beta [C]
    if config.upper.instance_weights_form == "net":
        known = known_features(data.train)  # [C, 3]
        return InstanceNet(data.domains, domain_of, config.weighs_domains, known, config.run.seed)
    return InstanceWeights(data.domains, domain_of, config.weighs_domains)  # beta [C], and alpha [K] for both


def make_instance_evidence(config: TrainingConfig, data: RunData) -> InstanceEvidence | None:
    """Make what the calm rule knows of single chains; None where these have no weights.

    Where domains have weights too, a chain is compared with the others of its domain.
    """
    if not config.weighs_instances:
        return None
    groups = [chain.domain if config.weighs_domains else 0 for chain in data.train]
    return InstanceEvidence(torch.tensor(groups))
