"""How much memory is still free: of a GPU, or of the main memory that a batch system or a container allows this job."""

import os
import re
from pathlib import Path

import psutil
import torch

from reweighting.distributed.rank0_output import dist_env

# The files of a control group, by its controller in /proc/self/cgroup: its limit, the memory in use, and the
# entry of memory.stat for the part in use that is only a cache of files. First those of cgroup v2, then of v1.
CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on the device.

    Processes on one CPU share its memory evenly. What torch's CUDA allocator holds unused counts as free.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    _, world, _ = dist_env()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 else 1  # on this machine, from torchrun
    return int(max(0, min(psutil.virtual_memory().available, *_free_in_cgroups())) // processes)


def _free_in_cgroups(root: Path = Path("/sys/fs/cgroup"), listing: Path = Path("/proc/self/cgroup")) -> list[float]:
    """What this process's control groups, and those around them, leave free; infinite if there is none."""
    free = [float("inf")]
    try:
        lines = listing.read_text().splitlines()
    except OSError:  # not Linux
        return free
    for line in lines:
        _, controller, path = line.split(":", 2)
        if controller not in CGROUP_FILES:
            continue
        limit, used, cache = CGROUP_FILES[controller]
        top = root / controller
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                cached = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.M)
                in_use = int((folder / used).read_text()) - (int(cached[1]) if cached else 0)
                free.append(int((folder / limit).read_text()) - in_use)
            except (OSError, ValueError):  # no such group, or no limit: "max"
                continue
    return free
