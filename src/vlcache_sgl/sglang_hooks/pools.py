"""Sizes and builds what SGLang keeps KV cache in, and says in tokens of memory how full it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool
from sglang.srt.runtime_context import get_parallel

from vlcache_sgl.capacity import KVShape, WindowShape, compressed_pool
from vlcache_sgl.config import ConfigError, KVConfig
from vlcache_sgl.memory.accounting import CellAccounting
from vlcache_sgl.memory.layers import Window
from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator
from vlcache_sgl.sglang_hooks.arena import KVArena
from vlcache_sgl.sglang_hooks.compat import attention_tp
from vlcache_sgl.sglang_hooks.facades import Configurator, Load, ModelRunner, PoolConfig, PoolStatsObserver
from vlcache_sgl.sglang_hooks.host_sharing import host_tokens
from vlcache_sgl.sglang_hooks.kv_layers import kv_layers, window_layers, window_tokens
from vlcache_sgl.sglang_hooks.prefix_tree import CompressedPrefixTree

FP8_CAPABILITY = (8, 9)
"""From which Triton has the type fp8_e4m3."""


class Pools:
    """Builds arena, slot allocator and prefix tree in the place of SGLang's.

    Args:
        config: the server's settings.

    Attributes:
        physical_tokens: uncompressed tokens that fit; 0 until the pools are sized.
        host_tokens: tokens that this rank would hold in host memory.
    """

    def __init__(self, config: KVConfig) -> None:
        self._config = config
        self.physical_tokens = 0
        self.host_tokens = 0
        self._accounting: CellAccounting | None = None

    def size(self, config: PoolConfig, configurator: Configurator, *_: Any, **__: Any) -> None:
        """After SGLang has sized its pool: what it calls tokens becomes virtual slots."""
        self.refuse_model(configurator)
        stock, shape = int(config.max_total_num_tokens), self._shape(configurator)
        if self._config.wants_host_memory and not configurator.server_args.disable_radix_cache:
            self.host_tokens = host_tokens(self._config.host_memory, shape, stock)
            group = attention_tp()[0]
            if group is not None:  # machines tell their ranks different things about their memory
                self.host_tokens = int(group.broadcast_object(self.host_tokens, src=0))
            if not self.host_tokens and self._config.host_memory != "auto":
                raise ConfigError(f"--kv-host-memory {self._config.host_memory} holds no token")
        pool = compressed_pool(
            stock,
            shape,
            self._config.overcommit_factor,
            graph_lists=configurator.device == "cuda",
            host_tokens=self.host_tokens,
            sketches=self._config.recall > 0,
        )
        self.physical_tokens = pool.physical_tokens
        config.max_total_num_tokens = pool.slots

    def refuse_model(self, configurator: Configurator) -> None:
        """Raise for models whose KV cache is not plain keys and values of all tokens in layers of attention."""
        kinds = {
            "multi-head latent attention (MLA)": configurator.use_mla_backend,
            "sliding-window attention": configurator.is_hybrid_swa,
            "models without layers of attention": not kv_layers(configurator.model_config),
        }
        for kind, present in kinds.items():
            if present:
                raise ConfigError(f"--kv-policy does not support {kind}")
        narrow = configurator.kv_cache_dtype == torch.float8_e4m3fn and configurator.device == "cuda"
        if narrow and torch.cuda.get_device_capability() < FP8_CAPABILITY:
            raise ConfigError("--kv-cache-dtype fp8_e4m3 needs a GPU of compute capability 8.9: use fp8_e5m2")

    def _shape(self, configurator: Configurator) -> KVShape:
        """What this rank stores per token."""
        parallel = get_parallel()
        model = configurator.model_config
        heads = int(model.get_num_kv_heads(parallel.attn_tp_size, parallel.attn_dcp_size))
        sliding = window_layers(model)
        window = None
        if sliding:
            own_heads = int(model.get_swa_num_kv_heads(parallel.attn_tp_size))
            window = WindowShape(len(sliding), own_heads, int(model.swa_head_dim), window_tokens(model))
        return KVShape(
            layers=len(kv_layers(model)),
            kv_heads=heads,
            head_dim=int(model.head_dim),
            element_bytes=configurator.kv_cache_dtype.itemsize,
            groups=heads if self._config.head_cells else 1,
            window=window,
        )

    def _window(self, configurator: Configurator, shape: KVShape) -> Window | None:
        """How layers with a window use cells."""
        if shape.window is None:
            return None
        return Window(
            window_layers(configurator.model_config),
            shape.window.kv_heads,
            shape.window.head_dim,
            shape.window.tokens,
            heads_per_cell=shape.window.heads_per_cell(shape.width),
            layers_per_cell=shape.window.layers_per_cell(shape.width),
        )

    def build_pool(
        self, _: Callable[..., Any], configurator: Configurator, *, max_total_num_tokens: int, **__: Any
    ) -> KVArena:
        """Instead of SGLang's token pool: the arena."""
        shape = self._shape(configurator)
        return KVArena(
            num_cells=self.physical_tokens * shape.planes,
            groups=shape.groups,
            layer_ids=kv_layers(configurator.model_config),
            window=self._window(configurator, shape),
            size=max_total_num_tokens,
            page_size=1,
            dtype=configurator.kv_cache_dtype,
            head_num=shape.kv_heads,
            head_dim=shape.head_dim,
            v_head_dim=configurator.model_config.v_head_dim,
            layer_num=shape.layers,
            device=configurator.device,
            enable_memory_saver=False,
            start_layer=configurator.layer_info.start_layer,
            end_layer=configurator.layer_info.end_layer,
            enable_alt_stream=False,
        )

    def build_hybrid_pool(
        self, original: Callable[..., Any], configurator: Configurator, *, max_total_num_tokens: int, **arguments: Any
    ) -> Any:
        """Instead of SGLang's pool of a model with linear-attention layers: the arena for the others, in the pool that
        SGLang's own allocator, tree and host copies expect."""
        arena = self.build_pool(original, configurator, max_total_num_tokens=max_total_num_tokens)
        return HybridLinearKVPool(
            size=max_total_num_tokens,
            dtype=arena.dtype,
            page_size=1,
            head_num=arena.head_num,
            head_dim=arena.head_dim,
            full_attention_layer_ids=list(kv_layers(configurator.model_config)),
            device=configurator.device,
            mamba_pool=arguments["req_to_token_pool"].mamba_pool,
            start_layer=configurator.layer_info.start_layer,
            full_kv_pool=arena,
        )

    def build_allocator(
        self, _: Callable[..., Any], configurator: Configurator, *, token_to_kv_pool: Any, **__: Any
    ) -> Any:
        """Instead of SGLang's slot allocator: ours, which also hands out cells."""
        allocator = VirtualSlotAllocator(token_to_kv_pool, physical_tokens=self.physical_tokens, need_sort=False)
        self._accounting = allocator.accounting
        return allocator

    def build_tree(self, original: Callable[..., Any], ctx: Any, *, cache_class: Any = None) -> Any:
        """SGLang's tree with our class."""
        return original(ctx, cache_class=cache_class or CompressedPrefixTree)

    def physical_capacity(self, original: property) -> property:
        """The longest prompt is bounded by physical tokens, however many slots there are."""

        def capacity(model_runner: ModelRunner) -> int:
            assert original.fget is not None
            host = None if self._accounting is None else self._accounting.host
            held = self.physical_tokens if host is None else max(self.physical_tokens, host.num_tokens)
            return min(int(original.fget(model_runner)), held)

        return property(capacity)

    def show_physical_tokens(self, stats: Any, observer: PoolStatsObserver) -> Any:
        """After SGLang has counted its pool in slots: usage in its logs and metrics is that of the memory.

        Free and evictable slots stay as they are: SGLang's leak checks add them up.
        """
        allocator = observer.token_to_kv_pool_allocator
        free = allocator.accounting.evictable_physical_tokens()
        used = self.physical_tokens - free
        return replace(stats, full_num_used=used, full_token_usage=used / self.physical_tokens)

    def show_physical_load(self, load: Load, *_: Any) -> Load:
        """After SGLang has described its load to routers: tokens are those of the memory."""
        if load.memory is not None:
            load.memory.token_capacity = self.physical_tokens
        load.max_total_num_tokens = self.physical_tokens
        return load
