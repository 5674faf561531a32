"""The batches of both levels: which chains each step reads, and which part of them each process gets."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from reweighting.config.training import TrainingConfig
from reweighting.data.samplers import ChainSampler, QuestionSampler, WindowSampler, small_batches
from reweighting.distributed import collectives
from reweighting.errors import UserError
from reweighting.modeling.collate import Batch, sort_by_length
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.training.build import meta_batch_size, micro_batches_per_step
from reweighting.training.run_data import RunData


class BatchSource:
    """Draw the batches of a run: a pure function of the seed and the number of the batch, so a run can resume anywhere.

    Args:
        config: the settings.
        data: what the run reads.

    Raises:
        UserError: if a process would get no part of some batch.
    """

    def __init__(self, config: TrainingConfig, data: RunData):
        self.data, self.batch_size = data, config.lower.batch_size
        members = [[] for _ in data.domains]
        for index, chain in enumerate(data.train):
            members[chain.domain].append(index)
        samplers = [
            QuestionSampler(data.train, indices, config.lower.batch_size, config.run.seed, 1, domain)
            if config.lower.group_by_question
            else ChainSampler(indices, config.lower.batch_size, config.run.seed, 1, domain)
            for domain, indices in enumerate(members)
        ]
        _check_sizes("batch_size", config.lower.batch_size, samplers)
        self.micro_batches_per_step = micro_batches_per_step(config, len(data.domains))
        slots = config.upper.unroll_steps * self.micro_batches_per_step
        self.sampler = WindowSampler(samplers, slots, config.run.seed)
        if data.meta:
            everything, size = range(len(data.meta)), meta_batch_size(config.upper, data)
            self.meta_sampler = QuestionSampler(data.meta, everything, size, config.run.seed, 3)
            _check_sizes("meta_batch_size", size, [self.meta_sampler])

    def train(self, model: ProcessRewardModel, micro_step: int) -> tuple[int, Batch]:
        """Return the domain of a lower-level micro-step (from 0), and this process's part of its batch."""
        domain, indices = self.sampler.draw(micro_step)
        train = self.data.train
        own = collectives.local_slice(indices)
        batch = model.make_batch([train[index] for index in own])
        labeled_steps = sum(train[index].num_labeled_steps for index in indices)
        return domain, replace(batch, num_labeled_steps=labeled_steps, chain_ids=torch.tensor(own))

    def meta(self, model: ProcessRewardModel, update: int) -> list[Batch]:
        """Return this process's part of the answers for an update (from 0), as batches of similar length.

        One batch, if step states are remembered: the head alone takes little memory.
        """
        drawn = self.meta_sampler.draw(update)
        chains = [self.data.meta[index] for index in collectives.local_slice(drawn)]
        if model.step_states is not None:
            return [model.make_batch(chains)]
        encoded = sort_by_length([model.chain_tokenizer.encode(chain) for chain in chains])
        return [model.collate(part) for part in small_batches(encoded, len(drawn), self.batch_size)]


def _check_sizes(name: str, size: int, samplers: Iterable[ChainSampler | QuestionSampler]) -> None:
    world = collectives.world_size()
    least = min(sampler.min_batch_size for sampler in samplers)
    if least < world:
        raise UserError(f"--{name} {size}: {world} processes share the chains of a batch, which can be {least}: use a "
                        "larger one")  # fmt: skip
