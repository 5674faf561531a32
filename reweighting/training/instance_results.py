"""The weights of single chains: what a run leaves of them.

instance_weights.parquet   a row for each training chain
instance_weights.html      the chains with the lowest and the highest weights, with their images
instance_net.safetensors   the network that computes the weights, where there is one
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from reweighting.bilevel.calm_weights import CalmWeights
from reweighting.bilevel.instance_evidence import InstanceEvidence
from reweighting.bilevel.instance_net import KNOWN, LOSSES, InstanceNet
from reweighting.bilevel.problems import DomainReweighting
from reweighting.data.chains import Chain
from reweighting.errors import UserError
from reweighting.files import atomic_file, atomic_write_text
from reweighting.inference.html_page import data_uri, render
from reweighting.terminal import printable
from reweighting.training.run_data import RunData

FILE, PAGE, NET = "instance_weights.parquet", "instance_weights.html", "instance_net.safetensors"
ON_PAGE = 12  # chains of either end
COLUMNS = ("chain", "weight")  # those that are read again


def chain_digest(chain: Chain, domains: list[str]) -> str:
    """Return what names a chain in the file, wherever its rows and images stand.

    It is a digest of the chain's domain, its question, its images' file names and its steps.
    """
    parts = (domains[chain.domain], chain.question, *(image.name for image in chain.images), *chain.steps)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@torch.no_grad()
def save_instance_weights(folder: Path, data: RunData, upper: DomainReweighting, evidence: InstanceEvidence) -> None:
    """Write file and page, and print how far the weights are apart.

    Args:
        folder: the output folder.
        data: the chains.
        upper: has learned their weights.
        evidence: its own, of the chains.

    Raises:
        UserError: if the disk refuses.
    """
    weights = upper.module().cpu()
    write_instance_weights(folder, data, weights, evidence)
    atomic_write_text(folder / PAGE, instance_page(data, weights, evidence))
    if isinstance(upper.module, InstanceNet):
        write_instance_net(folder, data.domains, upper.module)
    low, middle, high = weights.double().quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    print(printable(f"\ninstance weights in {folder / FILE}: median {middle:.2f}, 5 % below {low:.2f}, 5 % above "
                    f"{high:.2f}; the chains with the lowest and highest in {folder / PAGE}"))  # fmt: skip
    if isinstance(upper.optimizer, CalmWeights) and not evidence.true_slopes().any():
        print("No chain differs from the others that it is compared with: chance may explain the differences between "
              "the slopes. A longer run tells more")  # fmt: skip


def write_instance_weights(folder: Path, data: RunData, weights: torch.Tensor, evidence: InstanceEvidence) -> None:
    """Write `instance_weights.parquet`.

    Args:
        folder: the output folder.
        data: the chains.
        weights: of the chains, [C].
        evidence: in how many windows each chain was compared, and its mean slope.

    Raises:
        UserError: if the disk refuses.
    """
    import pyarrow  # half a second that other runs need not wait for
    import pyarrow.parquet

    mean = evidence.mean
    table = pyarrow.table(
        {
            "chain": [chain_digest(chain, data.domains) for chain in data.train],
            "source": [chain.source for chain in data.train],
            "rows": [list(chain.rows) for chain in data.train],
            "domain": [data.domains[chain.domain] for chain in data.train],
            "weight": weights.tolist(),
            "windows": evidence.count.long().tolist(),
            "slope": mean.tolist(),
            "question": [chain.question for chain in data.train],
        }
    )
    with atomic_file(folder / FILE) as file:
        pyarrow.parquet.write_table(table, file)


def write_instance_net(folder: Path, domains: list[str], net: InstanceNet) -> None:
    """Write `instance_net.safetensors`, whose metadata names what the network reads.

    Raises:
        UserError: if the disk refuses.
    """
    metadata = {"network": json.dumps({"inputs": [*LOSSES, *KNOWN], "domains": domains})}  # several come in any order
    with atomic_file(folder / NET) as file:
        file.write(safetensors.torch.save(net.tensors(), metadata))


def instance_page(data: RunData, weights: torch.Tensor, evidence: InstanceEvidence) -> str:
    """Return the page of the chains with the lowest and the highest weights [C], among those that were compared.

    An image that cannot be read any more is replaced by the reason.
    """
    met = [index for index in weights.argsort(stable=True).tolist() if evidence.count[index]]
    shown = min(ON_PAGE, len(met) // 2)
    ends = {"Lowest weights": met[:shown], "Highest weights": met[len(met) - shown :][::-1]}

    def instance(index: int) -> dict[str, Any]:
        chain = data.train[index]
        labels = [None if math.isnan(target) else target for target in chain.targets]
        return {
            "weight": weights[index].item(),
            "domain": data.domains[chain.domain],
            "windows": int(evidence.count[index]),
            "source": chain.source_location,
            "question": chain.question,
            "pictures": [_picture(image) for image in chain.images],
            "steps": list(zip(chain.steps, labels, strict=True)),
        }

    groups = [(heading, [instance(index) for index in indices]) for heading, indices in ends.items()]
    alike = not evidence.true_slopes().any()
    return render(
        "instances.html.jinja", generator="reweighting/main.py", total=len(weights), groups=groups, alike=alike
    )


def _picture(image: Path) -> tuple[str | None, str]:
    """The image as the page holds it, and what stands there without it."""
    try:
        return data_uri(image), ""
    except UserError as error:
        return None, str(error)
