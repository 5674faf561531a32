"""What a run reads step by step: which chains make the batches of both levels, and each process's share of them."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace

from reweighting.data.samplers import ChainSampler, QuestionSampler, WindowSampler, small_batches
from reweighting.distributed import collectives
from reweighting.errors import UserError
from reweighting.modeling.collate import Batch, by_length
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.training.run_data import RunData


class BatchSource:
    """Draws the batches of a run; which ones follows from the seed and the number of the batch alone.

    accumulation: micro-batches in a step. Raises UserError if a process would have no share of some batch.
    """

    def __init__(self, args: Namespace, data: RunData, accumulation: int):
        self.data, self.batch_size = data, args.batch_size
        members = [[] for _ in data.domains]
        for index, chain in enumerate(data.train):
            members[chain.domain].append(index)
        samplers = [
            QuestionSampler(data.train, indices, args.batch_size, args.seed, 1, domain)
            if args.group_by_question
            else ChainSampler(indices, args.batch_size, args.seed, 1, domain)
            for domain, indices in enumerate(members)
        ]
        _check_shares("batch_size", args.batch_size, samplers)
        self.sampler = WindowSampler(samplers, args.unroll_steps * accumulation, args.seed)
        if data.meta:
            everything = range(len(data.meta))
            self.meta_sampler = QuestionSampler(data.meta, everything, args.meta_batch_size, args.seed, 3)
            _check_shares("meta_batch_size", args.meta_batch_size, [self.meta_sampler])

    def train(self, model: ProcessRewardModel, micro_step: int) -> tuple[int, Batch]:
        """The domain of a micro-step of the lower level, and this process's share of its batch."""
        domain, indices = self.sampler.draw(micro_step)
        train, encode = self.data.train, model.chain_tokenizer.encode
        batch = model.collate([encode(train[index]) for index in collectives.local_slice(indices)])
        return domain, replace(batch, num_labeled_steps=sum(train[index].num_labeled_steps for index in indices))

    def meta(self, model: ProcessRewardModel, update: int) -> list[Batch]:
        """This process's share of the answers of an update of the weights, as batches of like length."""
        drawn, encode = self.meta_sampler.draw(update), model.chain_tokenizer.encode
        encoded = by_length([encode(self.data.meta[index]) for index in collectives.local_slice(drawn)])
        return [model.collate(part) for part in small_batches(encoded, len(drawn), self.batch_size)]


def _check_shares(name: str, size: int, samplers: Iterable[ChainSampler | QuestionSampler]) -> None:
    world = collectives.world_size()
    least = min(sampler.min_batch_size for sampler in samplers)
    if least < world:
        raise UserError(f"--{name} {size}: {world} processes share the chains of a batch, which can be {least}: use a "
                        "larger one")  # fmt: skip
