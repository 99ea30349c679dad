"""The platform class: what SGLang asks about its device, answered for a processor.

Import SGLang before it: SGLang looks for its platform while it is being imported, and finds half of this module.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import CpuArchEnum, PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from vlcache_sgl.platform import host

logger = logging.getLogger(__name__)

BIND_VARIABLE = "SGLANG_CPU_OMP_THREADS_BIND"
"""SGLang's own variable: the cores of each rank, ranks separated by a bar."""

CONVOLUTION_VARIABLE = "SGLANG_MAMBA_CONV_DTYPE"
"""SGLang's own variable: the type of the states of convolutions in linear-attention layers."""

MAX_RUNNING_REQUESTS = 64
"""SGLang would prepare for 2048: a gigabyte of page table at long contexts, and no CPU is that fast."""

CHUNKED_PREFILL_SIZE = 2048
"""Tokens.  SGLang derives it from the memory: 16384 on a large server, many seconds in which nobody else is served."""

MEM_FRACTION_STATIC = 0.8
"""Share of the free memory that weights and KV cache may take together.  SGLang's formula sets aside room for CUDA
graphs, which on a small machine leaves none for the weights."""

KV_MEMORY_SHARE = 8
KV_MAX_BYTES = 4 << 30
KV_MAX_TOKENS = 1 << 18
"""The KV cache of all ranks together is at most one KV_MEMORY_SHARE-th of the free memory, KV_MAX_BYTES large and
KV_MAX_TOKENS long, unless --max-total-tokens or --mem-fraction-static is given: main memory is not ours alone, and
every page of the pool is written to at the start."""


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang's answers about "the device" when it is the processor.

    Not `PlatformEnum.CPU`: that stands for SGLang's own CPU engine, and code that asks for it expects its kernels.
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def __init__(self) -> None:
        """Made once in every process, before SGLang applies what is registered here."""
        super().__init__()
        HookRegistry.register(PINNING, leave_unpinned, HookType.REPLACE)
        # With one rank on x86 nothing of SGLang is replaced; applying a hook costs each process a second of imports.
        if BIND_VARIABLE in os.environ or self.cpu_arch != CpuArchEnum.X86:
            for target, replacement in REPLACED.items():
                HookRegistry.register(target, replacement, HookType.REPLACE)

    def get_device(self, device_id: int = 0) -> str:
        """A string: SGLang compares it with ``"cpu"``, which no `torch.device` is equal to."""
        return "cpu"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """In bytes, as limited by a container."""
        return host.total_memory()

    def get_default_attention_backend(self) -> str:
        """`torch_native`: the only one of SGLang's that needs nothing but torch."""
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        """Never a compiler: the default needs a C++ toolchain and minutes."""
        return "eager"

    def support_mamba_cache_extra_buffer(self) -> bool:
        """Whether states of linear-attention layers can be kept in the middle of a prompt: they are copied here."""
        return True

    def post_load_model(self, model: torch.nn.Module) -> None:
        """Called in each worker once its weights are loaded, before it has an attention backend."""
        from vlcache_sgl.platform.linear_attention import replace_kernels

        replace_kernels(model)

    def get_torch_profiler_activity_str(self) -> str:
        """No name beside "CPU", which SGLang's profiler always knows; a second one would start it twice."""
        return ""

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        """What the profiler records here."""
        return torch.profiler.ProfilerActivity.CPU

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Defaults of a CPU for flags that were not given; SGLang records what is assigned.

        Called once, in the process that is started by the user.
        """
        if server_args.attention_backend in (None, "intel_amx"):
            # SGLang writes "intel_amx" where no flag was given; those kernels are not installed.
            server_args.attention_backend = self.get_default_attention_backend()
        if server_args.max_running_requests is None:
            server_args.max_running_requests = MAX_RUNNING_REQUESTS
        if server_args.chunked_prefill_size is None:
            server_args.chunked_prefill_size = CHUNKED_PREFILL_SIZE
        # The scheduler would poll for requests all the time, on a core that others could use.
        server_args.sleep_on_idle = True

        model = _model_config(server_args)
        if server_args.dtype == "auto" and model.dtype == torch.float16:
            # What SGLang makes of float32 checkpoints.  Few processors multiply float16, most take ten times as long.
            logger.info("Using bfloat16 instead of float16 on a CPU; --dtype float16 insists")
            server_args.dtype = "bfloat16"
        # Inputs that causal convolutions keep.  SGLang takes bfloat16 whatever the model computes in, and its kernels
        # convert; an assignment in torch does not.
        dtype = model.dtype if server_args.dtype != "bfloat16" else torch.bfloat16
        os.environ.setdefault(CONVOLUTION_VARIABLE, str(dtype).removeprefix("torch."))
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = MEM_FRACTION_STATIC
            if server_args.max_total_tokens is None:
                server_args.max_total_tokens = kv_tokens(
                    free_bytes=_free_memory() // server_args.dp_size,
                    token_bytes=_token_bytes(model, server_args.kv_cache_dtype),
                )
        local_ranks = server_args.tp_size * server_args.pp_size * server_args.dp_size // server_args.nnodes
        if local_ranks > 1:
            os.environ.setdefault(BIND_VARIABLE, host.split_cores(local_ranks))


def kv_tokens(free_bytes: int, token_bytes: int) -> int:
    """Length of the KV cache if nobody asks for another: tokens that fit in the share, within both limits."""
    return min(min(free_bytes // KV_MEMORY_SHARE, KV_MAX_BYTES) // token_bytes, KV_MAX_TOKENS)


def bind_rank(*, local_omp_cpuid: str, dist_init_method: str | None = None) -> None:
    """Keep a rank on its cores, in place of SGLang's function, which calls its CPU kernels for it."""
    if os.environ.get(BIND_VARIABLE, "all") != "all":
        host.bind_threads(host.parse_cpu_list(local_omp_cpuid))


def leave_unpinned(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
    """In place of torch's method, which fails where there is no device to pin memory for: SGLang pins the frames of
    videos without asking its platform."""
    return tensor


PINNING = "torch.Tensor.pin_memory"
REPLACED: dict[str, Callable[..., Any]] = {
    # Keeps ranks on cores of their own.  SGLang calls its kernels for it: without them the original does nothing on
    # x86, which leaves all ranks on all cores, and crashes on ARM.
    "sglang.srt.distributed.bootstrap._init_cpu_threads_env": bind_rank,
}
"""All of SGLang that the platform interface does not reach, and what takes its place."""


def _free_memory() -> int:
    """Bytes, as limited by a container."""
    from sglang.srt.utils.common import get_free_cpu_memory

    return int(get_free_cpu_memory())


def _model_config(server_args: Any) -> Any:
    """SGLang's `ModelConfig`, which it has made already at this point."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(server_args)


def _token_bytes(model: Any, kv_cache_dtype: str) -> int:
    """Bytes of keys and values of one token, all layers and all ranks."""
    numbers = model.num_attention_layers * model.get_total_num_kv_heads() * (model.head_dim + model.v_head_dim)
    return int(numbers * (1 if kv_cache_dtype.startswith("fp8") else model.dtype.itemsize))
