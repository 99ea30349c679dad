"""Logits of evicted keys, estimated from their sketches: a bit per dimension and a factor.

See `vlcache_sgl.recall.sketch`.  A code is `D / 8` bytes, bit i of byte j set where dimension ``8 j + i`` of the turned
key is not negative, and two bytes of a float16 factor.  The logit of a turned query q is estimated by
``factor * sum over d of q[d] * (bit d ? 1 : -1)``.
"""

from __future__ import annotations

import torch

from vlcache_kernels.checks import Backend, check_device, check_float, check_index, check_shape, use_triton
from vlcache_kernels.sketch_scores import naive

__all__ = ["FACTOR_BYTES", "sketch_scores"]

FACTOR_BYTES = naive.FACTOR_BYTES


def sketch_scores(
    queries: torch.Tensor, codes: torch.Tensor, rows: torch.Tensor, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Estimated logits, without the scale of attention; higher = more attention.

    Args:
        queries: `[B, H, D]` float32, turned as the keys were; D is a multiple of 8, H of K, and neighbouring query
            heads share a KV head.
        codes: `[R, K, D / 8 + 2]` uint8, contiguous.
        rows: `[B, n]` int, which codes belong to each request; not negative.
        backend: "auto" takes Triton on a GPU and the reference elsewhere.

    Returns:
        `[B, H, n]` float32.
    """
    check_shape("queries", queries, (None, None, None))
    batch, heads, dim = queries.shape
    check_shape("codes", codes, (None, None, dim // 8 + FACTOR_BYTES))
    check_shape("rows", rows, (batch, None))
    check_float("queries", queries)
    check_index("rows", rows)
    if dim % 8 or heads % codes.shape[1]:
        raise ValueError(f"{heads} query heads of {dim} dimensions do not fit codes of {codes.shape[1]} KV heads")
    check_device(queries.device, codes=codes, rows=rows)
    if use_triton(backend, queries.device) and rows.numel():
        from vlcache_kernels.sketch_scores import triton

        return triton.sketch_scores(queries, codes, rows)
    return naive.sketch_scores(queries, codes, rows)
