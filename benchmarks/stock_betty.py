"""The two levels on Betty 0.2.1 as it comes, in the plainest way that is correct: what the command is compared with.

A training row is its prefix of the chain, with an image encoding and a forward pass of its own. A meta answer has one
for each of its prefixes. The hypergradient is Betty's `darts`: finite differences on the last row of the unrolled five.
Two overrides let it run at all: Betty rebuilds AdamW from its defaults, which raises TypeError, and trains frozen
parameters.
"""

from dataclasses import replace
from pathlib import Path

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem

from reweighting.bilevel.domain_weights import DomainWeights
from reweighting.data.chains import meta_chains, training_chains
from reweighting.data.load_rows import load_meta_rows, load_training_rows
from reweighting.modeling.collate import collate
from reweighting.modeling.reward_model import ProcessRewardModel

UNROLL = 5  # as published


class Runnable(ImplicitProblem):
    """The overrides without which stock Betty does not run."""

    def patch_optimizer(self) -> None:
        """Keep the optimizer."""

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are not frozen."""
        return [p for p in self.module.parameters() if p.requires_grad]


class Lower(Runnable):
    """Fine-tuning on rows: the mean over a batch of w_k * (score - accuracy)^2."""

    rows_seen = 0

    def optimizer_step(self, *args, **kwargs) -> None:
        """Betty's, with the batch's rows counted."""
        super().optimizer_step(*args, **kwargs)
        self.rows_seen += len(self.cur_batch["domains"])

    def training_step(self, batch: dict) -> torch.Tensor:
        z = self.module(batch["batch"])  # [B, S]
        last = z.gather(1, batch["batch"].step_mask.sum(1, keepdim=True) - 1).squeeze(1)  # the prefix's own step
        return (self.upper.module()[batch["domains"]] * (last.sigmoid() - batch["accuracies"]).square()).mean()


class Upper(Runnable):
    """The meta loss of one answer, a pass for each of its prefixes."""

    def training_step(self, batch: dict) -> torch.Tensor:
        logits = [self.lower.module(one)[0, len(one.chains[0].steps) - 1] for one in batch["prefixes"]]
        return (torch.stack(logits).mean().sigmoid() - batch["label"]).square()


def prefixes(model: ProcessRewardModel, chain) -> list:
    """A batch of one for each prefix of a chain."""
    return [
        collate([model.chain_tokenizer.encode(replace(chain, steps=chain.steps[: n + 1], targets=()))])
        for n in range(len(chain.steps))
    ]


class TrainLoader:
    """Batches of random rows, each row its prefix."""

    def __init__(self, model: ProcessRewardModel, data: Path, batch_size: int):
        self.model, self.batch_size = model, batch_size
        rows = load_training_rows(data / "train.json")
        chains, domains = training_chains(rows)
        # Each labeled step of each chain is one row.
        self.rows = [
            (replace(chain, steps=chain.steps[: n + 1], targets=()), chain.domain, target)
            for chain in chains
            for n, target in enumerate(chain.targets)
            if target == target
        ]
        self.domains = domains

    def __iter__(self):
        order = torch.randperm(len(self.rows)).tolist()
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            part = [self.rows[i] for i in order[start : start + self.batch_size]]
            yield {
                "batch": collate([self.model.chain_tokenizer.encode(chain) for chain, _, _ in part]),
                "domains": torch.tensor([domain for _, domain, _ in part]),
                "accuracies": torch.tensor([target for _, _, target in part]),
            }


class MetaLoader:
    """Random meta answers, one at a time."""

    def __init__(self, model: ProcessRewardModel, data: Path):
        self.model, self.chains = model, meta_chains(load_meta_rows(data / "meta.json"))[0]

    def __iter__(self):
        for i in torch.randperm(len(self.chains)).tolist():
            yield {"prefixes": prefixes(self.model, self.chains[i]), "label": self.chains[i].label}


def stock(backbone: str, data: Path, batch_size: int, steps: int, seed: int = 1, meta_lr: float = 0.01) -> Engine:
    """An engine that knows its `domains`, whose lower problem counts the rows that it has trained on in `rows_seen`."""
    torch.manual_seed(seed)
    model = ProcessRewardModel.from_backbone(backbone, freeze_vision=True)
    model.chain_tokenizer.encode_image = None  # the vision tower sees each image anew
    train = TrainLoader(model, data, batch_size)
    table = DomainWeights(train.domains)
    parameters = [p for p in model.parameters() if p.requires_grad]
    lower = Lower("lower", Config(type="darts", unroll_steps=UNROLL), model,
                  torch.optim.AdamW(parameters, lr=3e-4), train_data_loader=train)  # fmt: skip
    upper = Upper("upper", Config(), table, torch.optim.AdamW(table.parameters(), lr=meta_lr),
                  train_data_loader=MetaLoader(model, data))  # fmt: skip
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    engine = Engine([upper, lower], EngineConfig(train_iters=steps), dependencies)
    engine.domains = train.domains
    return engine
