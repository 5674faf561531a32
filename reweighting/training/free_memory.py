"""How much memory can still be had: of a GPU; else of the main memory, as far as a batch system or a container lets
this job have it."""

import os
import re
from pathlib import Path

import psutil
import torch

from reweighting.distributed.rank0_output import dist_env

# A control group's files, by the name in /proc/self/cgroup of what keeps them: its limit, what is in use, and the
# entry of memory.stat for the part of that which is only a cache of files. First those of cgroup v2, then of v1.
GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(device: torch.device) -> int:
    """The bytes that this process can still have on the device. Processes on one CPU share its memory evenly."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    _, world, _ = dist_env()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 else 1  # torchrun's
    return int(max(0, min(psutil.virtual_memory().available, *_free_in_groups())) // here)


def _free_in_groups(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[float]:
    """What the control groups of this process, and those around them, still let it have; infinite if there is none."""
    free = [float("inf")]
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return free
    for line in lines:
        _, kept_by, path = line.split(":", 2)
        if kept_by not in GROUP_FILES:
            continue
        limit, used, cache = GROUP_FILES[kept_by]
        top = groups / kept_by
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                kept = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.M)
                in_use = int((folder / used).read_text()) - (int(kept[1]) if kept else 0)
                free.append(int((folder / limit).read_text()) - in_use)
            except (OSError, ValueError):  # no such group, or no limit: "max"
                continue
    return free
