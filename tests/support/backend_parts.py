"""SGLang's attention backend over an arena, for tests without a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from provider_bench import DEVICE, DIM, DTYPE, HEADS, KV_HEADS, LAYERS, SCALE


def make_pool(groups: int, tokens: int = 200, stored: torch.dtype = DTYPE) -> Any:
    from vlcache_sgl.sglang_hooks.arena import KVArena

    return KVArena(
        num_cells=tokens * LAYERS * groups,
        groups=groups,
        size=tokens,
        page_size=1,
        dtype=stored,
        head_num=KV_HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device=str(DEVICE),
        enable_memory_saver=False,
        enable_alt_stream=False,
    )


def make_backend(name: str, pool: Any, table: torch.Tensor, compressor: Any) -> Any:
    from vlcache_sgl.sglang_hooks.backend import ResidencyBackend

    runner = SimpleNamespace(
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        dtype=DTYPE,
        server_args=SimpleNamespace(triton_attention_num_kv_splits=3),
    )
    return ResidencyBackend(runner, compressor, name, HEADS)


def layer_of_model(number: int, scales: tuple[float, float] | None = None) -> SimpleNamespace:
    """SGLang's description of a layer, with the scales of its keys and values as a checkpoint brings them."""
    tensors = (None, None) if scales is None else tuple(torch.tensor(scale) for scale in scales)
    return SimpleNamespace(
        layer_id=number,
        tp_q_head_num=HEADS,
        tp_k_head_num=KV_HEADS,
        tp_v_head_num=KV_HEADS,
        head_dim=DIM,
        scaling=SCALE,
        k_scale=tensors[0],
        v_scale=tensors[1],
        k_scale_float=None if scales is None else scales[0],
        v_scale_float=None if scales is None else scales[1],
    )
