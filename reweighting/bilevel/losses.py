"""The losses of the two levels, as functions of step logits.

A process may hold a part of a batch only. Its loss is then its part of the batch's loss: the parts add up.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits

from reweighting.bilevel.label_correction import StepLabels
from reweighting.data.chains import Chain
from reweighting.devices import autocast
from reweighting.distributed import collectives
from reweighting.modeling.collate import Batch

# ({name: parameter}, micro-batch) -> loss parts [B], or with the labels' costs [B, 1 + S]
LossFunction = Callable[[Mapping[str, Tensor], Batch], Tensor]
StepLoss = Callable[[Tensor, Batch], Tensor]  # (step logits [B, S], micro-batch) -> loss of each step [B, S]


def squared_error(logits: Tensor, batch: Batch) -> Tensor:
    """Compute (sigmoid(z) - p)^2 of each step.

    Args:
        logits: Step logits z, [B, S].
        batch: Their chains, with the targets p in [0, 1].

    Returns:
        [B, S]; of steps without a target, any number.
    """
    return (logits.sigmoid() - batch.targets).square()


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Compute -p log sigmoid(z) - (1 - p) log(1 - sigmoid(z)) of each step.

    Its minimum is the entropy of the targets, which is 0 only where all of them are 0 or 1.

    Args:
        logits: Step logits z, [B, S].
        batch: Their chains, with the targets p in [0, 1].

    Returns:
        [B, S]; of steps without a target, any number.
    """
    return binary_cross_entropy_with_logits(logits, batch.targets.to(logits.dtype), reduction="none")


def mean_loss(errors: Tensor, batch: Batch) -> Tensor:
    """Compute the loss of a micro-batch: the mean over its labeled steps.

    Args:
        errors: Loss of each step, [B, S].
        batch: Their chains.

    Returns:
        This process's part of the mean, a scalar.
    """
    return errors[batch.target_mask].sum() / batch.num_labeled_steps


def loss_parts(errors: Tensor, batch: Batch) -> Tensor:
    """Compute what each chain adds to the loss of a micro-batch; the parts sum up to `mean_loss`.

    Args:
        errors: Loss of each step, [B, S].
        batch: Their chains.

    Returns:
        [B].
    """
    return torch.where(batch.target_mask, errors, 0).sum(1) / batch.num_labeled_steps


def label_costs(step_loss: StepLoss, logits: Tensor, batch: Batch) -> Tensor:
    """Compute how much more of a micro-batch's loss a label of 1 costs than one of 0, for each step.

    The loss of a step is linear in its label but for a term without parameters (the entropy's, and the square of the
    label). So the gradient of this cost is what the loss's gradient gains for each unit of the label.

    Args:
        step_loss: Of `STEP_LOSSES`.
        logits: Step logits z, [B, S].
        batch: Their chains.

    Returns:
        [B, S]; of steps without a target, any number.
    """
    ones = replace(batch, targets=torch.ones_like(batch.targets))
    zeros = replace(batch, targets=torch.zeros_like(batch.targets))
    return (step_loss(logits, ones) - step_loss(logits, zeros)) / batch.num_labeled_steps


STEP_LOSSES: dict[str, StepLoss] = {"mse": squared_error, "bce": cross_entropy}  # by the name that --lower_loss gives


def loss_at_parameters(
    module: nn.Module, precision: str, step_loss: StepLoss = squared_error, labels: StepLabels | None = None
) -> LossFunction:
    """Make the parts of the unweighted loss a function of the trained parameters, without dropout.

    Args:
        module: The reward model.
        precision: Of the compute, "fp32" or "bf16".
        step_loss: Of `STEP_LOSSES`.
        labels: Those that are corrected, if any are.

    Returns:
        ({name: parameter}, micro-batch) -> what each of this process's chains adds to its loss, [B]; where labels are
        corrected, with what each label adds behind it (`label_costs`), [B, 1 + S].
    """

    def loss(params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        was_training = module.training
        module.eval()
        try:
            with autocast(batch.targets.device, precision):
                logits = functional_call(module, dict(params), (batch,))  # [B, S]
                if labels is None:
                    return loss_parts(step_loss(logits, batch), batch)
                parts = loss_parts(step_loss(logits, labels.corrected(batch)), batch)
                return torch.cat([parts[:, None], label_costs(step_loss, logits, batch)], 1)  # [B, 1 + S]
        finally:
            module.train(was_training)

    return loss


def center_aggregates(aggregates: Tensor, chains: Sequence[Chain], positive_rate: float) -> Tensor:
    """Move the aggregates of each group of compared answers to where their mean belongs, see `centering_groups`.

    Args:
        aggregates: Of this process's chains, [B].
        chains: This process's chains, [B].
        positive_rate: Fraction of correct answers in the whole meta set.

    Returns:
        Centered aggregates, [B]. Gradients flow through the group means, across processes too.
    """
    parts = collectives.all_gather_object(list(chains))
    groups, level = centering_groups([chain for part in parts for chain in part], positive_rate)  # [all B], [G]
    level = level.to(aggregates)
    counts = torch.bincount(groups).to(aggregates)  # [G]
    own = groups.split([len(part) for part in parts])[collectives.rank()].to(aggregates.device)  # [B]
    sums = collectives.differentiable_all_reduce_sum(torch.zeros_like(level).index_add(0, own, aggregates))  # [G]
    return aggregates + (level - sums / counts)[own]


def centering_groups(chains: Sequence[Chain], positive_rate: float) -> tuple[Tensor, Tensor]:
    """Decide which answers are compared with each other, and where their mean belongs.

    Choosing compares the answers to one question, so what these have in common does not matter; and it would drown the
    rest: a domain whose labels are too high as a whole would be a cheap remedy for scores that are too low, however
    poor its labels. Correct and incorrect answers to one question are a group; all others together are one more.

    Args:
        chains: Meta chains, [B].
        positive_rate: Fraction of correct answers in the whole meta set.

    Returns:
        The group of each chain, [B] int64, and for each group the logit of its fraction of correct answers, [G]; for
        the group of all others, of `positive_rate`.
    """
    labels = defaultdict(list)
    for chain in chains:
        labels[chain.prompt].append(chain.label)
    rates = {prompt: sum(found) / len(found) for prompt, found in labels.items()}
    mixed = [prompt for prompt, rate in rates.items() if 0 < rate < 1]
    number = {prompt: index for index, prompt in enumerate(mixed)}
    groups = [number.get(chain.prompt, len(mixed)) for chain in chains]
    used = [rates[prompt] for prompt in mixed] + [positive_rate] * (len(mixed) in groups)
    return torch.tensor(groups), torch.logit(torch.tensor(used))
