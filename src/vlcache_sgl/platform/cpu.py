"""SGLang on any CPU, without SGLang's own CPU kernels: when, and what must be set before torch is used.

SGLang has a CPU engine of its own: it needs `SGLANG_USE_CPU_ENGINE=1` and a separate build of its kernels.  Without
both it refuses to start on a machine that has no accelerator.  `CpuPlatform` lets it start there: all layers use their
plain torch implementations and attention is `torch_native`.  It is not used where SGLang has something better to
choose.

SGLang looks for its platform while it is being imported, so nothing of SGLang can be imported here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import multiprocessing
import os
from collections.abc import Callable

import torch

from vlcache_sgl.platform import host
from vlcache_sgl.sglang_hooks.flags import check_before_imports

logger = logging.getLogger(__name__)

CPU_KERNEL_DISTRIBUTIONS = ("sglang-kernel-cpu", "sgl-kernel-cpu")

ACCELERATORS: dict[str, Callable[[], bool]] = {
    # Counted through NVML: `torch.cuda.is_available` may initialise CUDA, which forked children cannot use then.
    "cuda or rocm": lambda: torch.cuda.device_count() > 0,
    "xpu": lambda: torch.xpu.device_count() > 0,
    "mps": lambda: torch.backends.mps.is_available(),
    # For these SGLang looks at the software only, and so do we: it would choose them.
    "npu": lambda: hasattr(torch, "npu"),
    "hpu": lambda: importlib.util.find_spec("habana_frameworks") is not None,
    "musa": lambda: getattr(torch.version, "musa", None) is not None,
    # Last: it asks the driver, and only what none of the above has found.
    "another": lambda: torch.accelerator.is_available(),
}
"""What SGLang, or another platform plugin, may prefer to a CPU, and how to see that it is there."""


def activate() -> str | None:
    """SGLang's entry point: the class to use, or None where SGLang should choose by itself.

    Runs in every process, early in the import of SGLang: also the first moment when wrong flags can be refused.
    """
    if multiprocessing.parent_process() is None:
        check_before_imports()
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if any(is_present() for is_present in ACCELERATORS.values()):
        return None
    if any(_is_installed(name) for name in CPU_KERNEL_DISTRIBUTIONS):
        logger.warning("SGLang's CPU kernels are installed; set SGLANG_USE_CPU_ENGINE=1 to use them")
        return None
    _set_environment()
    return "vlcache_sgl.platform.srt:CpuPlatform"


def _set_environment() -> None:
    """Defaults that are read from the environment, for this process where it is not too late and for its children."""
    cores = host.usable_cores()
    if "OMP_NUM_THREADS" not in os.environ and cores < torch.get_num_threads():
        torch.set_num_threads(cores)  # torch has read the variable already
    defaults = {
        # Containers often see more cores than they get time on.
        "OMP_NUM_THREADS": str(cores),
        # Several processes share the cores.  Threads that spin while they wait keep the others from working.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Nothing is worth compiling here; torch tries for 20 seconds at the start.
        "TORCHDYNAMO_DISABLE": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
