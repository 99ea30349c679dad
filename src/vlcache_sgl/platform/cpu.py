"""SGLang on any CPU, without SGLang's own CPU kernels."""

from __future__ import annotations

import os

import torch


def activate() -> str | None:
    """Name of the platform class, or None where SGLang should choose by itself."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or torch.cuda.is_available():
        return None
    return "vlcache_sgl.platform.srt:CpuPlatform"
