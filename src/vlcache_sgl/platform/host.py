"""What this machine lets us use: cores, memory, and binding of threads.  Linux files only, no SGLang."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import torch

_CPUS = Path("/sys/devices/system/cpu")
_NODES = Path("/sys/devices/system/node")
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Files of control groups v2 and v1, relative to where they are mounted."""


def parse_cpu_list(text: str) -> list[int]:
    """CPU numbers of the notation of the kernel and of taskset: ``"0-2,8"`` is ``[0, 1, 2, 8]``."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def format_cpu_list(cpus: list[int]) -> str:
    """The reverse of `parse_cpu_list`, without ranges."""
    return ",".join(str(cpu) for cpu in cpus)


def physical_cores() -> list[int]:
    """One CPU number per physical core that this process may run on, those of a NUMA node together."""
    node_of: dict[int, int] = {}
    for path in _NODES.glob("node[0-9]*/cpulist"):
        for cpu in parse_cpu_list(path.read_text()):
            node_of[cpu] = int(path.parent.name.removeprefix("node"))
    first_of_core: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = _read(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu)
        first_of_core.setdefault(siblings, cpu)
    return sorted(first_of_core.values(), key=lambda cpu: (node_of.get(cpu, 0), cpu))


def usable_cores() -> int:
    """Physical cores, or fewer where a container gets a smaller share of CPU time than it sees cores."""
    cores = len(physical_cores())
    quota, _, period = (_read(_CGROUP / "cpu.max") or "max").partition(" ")
    if quota != "max":
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def split_cores(ranks: int) -> str:
    """Disjoint shares of the cores for `ranks` processes, as `SGLANG_CPU_OMP_THREADS_BIND` wants them: ``"0,1|2,3"``.

    With more ranks than cores, several ranks get the same core.
    """
    cores = physical_cores()
    bounds = [rank * len(cores) // ranks for rank in range(ranks + 1)]
    shares = [cores[a : max(b, a + 1)] for a, b in itertools.pairwise(bounds)]
    return "|".join(format_cpu_list(share) for share in shares)


def total_memory() -> int:
    """Bytes of memory this process may use: the machine's, or the container's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [_read(_CGROUP / name) for name in _MEMORY_LIMITS]
    return min([total, *(int(limit) for limit in limits if limit and limit != "max")])


def bind_threads(cpus: list[int]) -> None:
    """Keep all threads of this process on these CPUs and compute with as many threads."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cpus)
    torch.set_num_threads(len(cpus))


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
