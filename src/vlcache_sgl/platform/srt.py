"""The platform class: what SGLang asks about its device, answered for a processor.

Import it after SGLang only: SGLang looks for its platform while it is being imported.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from vlcache_sgl.platform import host
from vlcache_sgl.runtime.patching import Patches, PatchPoint

BIND_VARIABLE = "SGLANG_CPU_OMP_THREADS_BIND"
"""SGLang's own variable: the cores of each rank, ranks separated by a bar."""

MAX_RUNNING_REQUESTS = 64
"""SGLang would prepare for 2048 requests: a gigabyte of page table at long contexts, and no CPU is that fast."""

CHUNKED_PREFILL_SIZE = 2048
"""Tokens.  SGLang derives it from the memory: 16384 on a large server, many seconds in which nobody else is served."""

MEM_FRACTION_STATIC = 0.8
"""Share of the free memory that weights and KV cache may take together.  SGLang's formula sets aside room for CUDA
graphs, which on a small machine leaves none for the weights."""

class CpuPlatform(SRTPlatform, CpuDeviceMixin):  # type: ignore[misc]  # SGLang has no types
    """SGLang's answers about "the device" when it is the processor.

    Not `PlatformEnum.CPU`: that stands for SGLang's own CPU engine, and code that asks for it expects its kernels.
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_device(self, device_id: int = 0) -> str:
        """A string: SGLang compares it with ``"cpu"``, which no `torch.device` is equal to."""
        return "cpu"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """In bytes, as limited by a container."""
        return host.total_memory()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        """Never a compiler: the default needs a C++ toolchain and minutes."""
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        """No name beside "CPU", which SGLang's profiler always knows; a second one would start it twice."""
        return ""

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Defaults of a CPU for flags that were not given; `server_args` records what is assigned."""
        if server_args.attention_backend in (None, "intel_amx"):
            # SGLang put "intel_amx" there for lack of a flag.  Those kernels are not installed.
            server_args.attention_backend = self.get_default_attention_backend()
        if server_args.max_running_requests is None:
            server_args.max_running_requests = MAX_RUNNING_REQUESTS
        if server_args.chunked_prefill_size is None:
            server_args.chunked_prefill_size = CHUNKED_PREFILL_SIZE
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = MEM_FRACTION_STATIC

    def init_backend(self) -> None:
        """Called in each process that computes, before the ranks meet."""
        Patches(PATCH_POINTS).install()


def bind_rank(*, local_omp_cpuid: str, dist_init_method: str | None = None) -> None:
    """Take the place of SGLang's binding of a rank to its cores, which calls its CPU kernels."""
    if os.environ.get(BIND_VARIABLE, "all") != "all":
        host.bind_threads(host.parse_cpu_list(local_omp_cpuid))


PATCH_POINTS = (
    PatchPoint(
        "sglang.srt.distributed.bootstrap:_init_cpu_threads_env",
        "replace",
        lambda original: bind_rank,
        "ranks on cores of their own; SGLang's crashes on ARM without its CPU kernels and does nothing on most others",
    ),
)
"""All of SGLang that the platform interface does not reach."""


