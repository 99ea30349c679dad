"""Which provider serves."""

from __future__ import annotations

from collections.abc import Callable

from vlcache_sgl.attention.base import AttentionKernels, HeadShape, Provider
from vlcache_sgl.attention.torch import TorchProvider
from vlcache_sgl.memory.batches import Memory


def make_provider(
    name: str, memory: Memory, shape: HeadShape, triton_kernels: Callable[[], AttentionKernels], *, kv_splits: int = 8
) -> Provider:
    """The provider that takes the place of SGLang's attention backend `name`.

    Args:
        triton_kernels: imports what `triton` launches.
        kv_splits: most parts that Triton cuts one request's keys into (SGLang's --triton-attention-num-kv-splits).
    """
    if name == "triton":
        from vlcache_sgl.attention.triton import TritonProvider

        return TritonProvider(memory, shape, triton_kernels(), kv_splits=kv_splits)
    if name == "flashinfer":
        from vlcache_sgl.attention.flashinfer import FlashInferProvider

        return FlashInferProvider(memory, shape)
    return TorchProvider(memory, shape.dtype)
