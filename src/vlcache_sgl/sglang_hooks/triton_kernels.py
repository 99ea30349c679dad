"""SGLang's own Triton kernels of attention, for the provider that launches them over cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlcache_sgl.attention.base import AttentionKernels


def attention_kernels() -> AttentionKernels:
    """Extend and decode attention; imported when a server uses them, because a machine without Triton has none."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    # As SGLang calls them under --enable-torch-compile.
    opaque: Callable[..., Any] = torch.compiler.disable
    return AttentionKernels(opaque(extend_attention_fwd), opaque(decode_attention_fwd))
