"""Work to do on the CPU and on another device, `second` or `cuda`: python -m tests.device_work folder device

The folder holds a demo world, and in the end what was found as work.json. A process of its own, since torch must know
its devices from the start.
"""

import json
import sys
import traceback
from functools import partial
from pathlib import Path

import torch

from reweighting.data.chains import Chain
from reweighting.distributed.sharding import Replicated
from reweighting.main import main
from reweighting.modeling.reward_model import ProcessRewardModel
from tests.runs import flags, history
from tests.second_device import NAME, SecondDevice, install
from tests.tiny import draw_cells, tiny_backbone
from tests.tiny_families import DEVICE_FAMILIES, TEXT_FAMILIES, tiny_family

RUNS = {
    "unrolled": ("--max_grad_norm", "0.1"),
    "finite-difference": ("--hypergradient", "finite_difference", "--max_grad_norm", "0.1"),
    "sgd": ("--optimizer", "sgd", "--lr", "0.01", "--group_by_question"),
    "lora": ("--lora_rank", "2", "--gradient_checkpointing"),
    "all-trained": ("--no_freeze_vision", "--attention", "eager", "--scheduler", "cosine"),
    "head": ("--train", "head"),
    "darts": ("--hypergradient", "darts"),
    "baseline": ("--baseline",),
}


def run(name: str, device: str, folder: Path) -> list[dict]:
    """The history of a run of one window; of the first one with validation, and gone on with for another window."""
    first = name == "unrolled"
    more = ("--validation_json_file", str(folder / "test.json")) if first else ()
    for steps in ("5", "10") if first else ("5",):
        main(flags(folder, folder / name / device, "--reward_model", str(tiny_backbone()), *RUNS[name], *more,
                   "--device", device, "--precision", "fp32", "--iteration_num", steps, "--resume"))  # fmt: skip
    return history(folder / name / device)


def scores_and_gradient(family: str, device: str, folder: Path) -> list:
    """Step scores of two chains, with an image where the family reads one, and the norms of a loss's gradient."""
    text_only = family in TEXT_FAMILIES
    images = () if text_only else (draw_cells(folder / "cells.png"),)
    steps = ("Step 1: two in the first row", "Step 2: so 3 in all")
    chains = [Chain("How many?", steps[:n], images, targets=(0.9, 0.1)[:n]) for n in (2, 1)]
    torch.manual_seed(0)
    model = ProcessRewardModel.from_backbone(
        tiny_family(family), device=device, freeze_projector=None if text_only else False
    )
    scores = model.chain_logits(chains)[0]
    model.train()
    batch = model.collate([model.chain_tokenizer.encode(chain) for chain in chains])
    loss = (model(batch).sigmoid() - batch.targets)[batch.target_mask].square().mean()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return [scores.tolist(), [grad.norm().item() for grad in grads]]


def meet(device: str) -> list:
    """The sum of a tensor on the device, brought to the CPU, with one of the CPU; the device of one that is made of it;
    and what comes of the sum without bringing it."""
    there, here = torch.ones(3, device=device), torch.ones(3)
    try:
        mixed = (there + here).tolist()
    except RuntimeError as error:
        mixed = str(error)
    return [(there.to("cpu") + here).tolist(), (there * 2).device.type, mixed]


def all_work(device: str, folder: Path) -> dict:
    """What everything came to, an error's text in the place of what it kept from being found."""
    work = {name: partial(run, name, device, folder) for name in RUNS}
    work |= {family: partial(scores_and_gradient, family, device, folder) for family in DEVICE_FAMILIES}
    work |= {"meet": partial(meet, device)}
    found = {}
    for name, do in work.items():
        try:
            found[name] = do()
        except Exception:
            found[name] = traceback.format_exc()
    return found


def on_both_devices(folder: Path, other: str) -> dict:
    """All work, on the CPU first: what is imported while the second device is there may be torn."""
    if other == NAME:
        install()
    found = {"cpu": all_work("cpu", folder)}
    if other != NAME:
        return found | {other: all_work(other, folder)}
    # transformers looks at the memory's addresses when it saves, of which these tensors have none.
    Replicated.full_state_dict = lambda self: {name: tensor.cpu() for name, tensor in self.module.state_dict().items()}
    with SecondDevice():
        return found | {NAME: all_work(NAME, folder)}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "work.json").write_text(json.dumps(on_both_devices(place, sys.argv[2])))
