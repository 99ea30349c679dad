"""The start of a model: its attention backend, and the compressor that is shown what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlcache_sgl.api import Prompt
from vlcache_sgl.compression.compressor import Compressor
from vlcache_sgl.config import ConfigError, KVConfig
from vlcache_sgl.counters import Counters
from vlcache_sgl.policy.choice import Choices
from vlcache_sgl.scoring.scoring import wanted_statistics
from vlcache_sgl.scoring.tensor_parallel import HeadGather
from vlcache_sgl.sglang_hooks.arena import arena_of
from vlcache_sgl.sglang_hooks.attention_kinds import refuse_layers
from vlcache_sgl.sglang_hooks.backend import ResidencyBackend
from vlcache_sgl.sglang_hooks.compat import attention_tp, slot_writers
from vlcache_sgl.sglang_hooks.facades import ModelRunner
from vlcache_sgl.sglang_hooks.host_sharing import HostSharing
from vlcache_sgl.sglang_hooks.patching import PatchError
from vlcache_sgl.sglang_hooks.pools import Pools
from vlcache_sgl.sglang_hooks.rotary import model_rotary
from vlcache_sgl.weights import find_weights


@dataclass(frozen=True)
class ServedModel:
    """What belongs to the model of this process."""

    compressor: Compressor
    backend: ResidencyBackend
    host: HostSharing | None
    """Where prefixes are shared without loss; None: without host memory."""
    module: torch.nn.Module
    """SGLang's."""
    ranks: int
    """Over which attention heads are divided."""


class ModelStart:
    """Builds the attention backend in the place of SGLang's.

    Args:
        config: the server's settings.
        choices: is told which model it chooses for.
        pools: sized for the model.
        counters: where the compressor counts.

    Attributes:
        served: the model; None until SGLang has asked for its backend.
    """

    def __init__(self, config: KVConfig, choices: Choices, pools: Pools, counters: Counters) -> None:
        self._config = config
        self._choices = choices
        self._pools = pools
        self._counters = counters
        self.served: ServedModel | None = None

    def build_backend(self, name: str, model_runner: ModelRunner) -> Any:
        """Instead of SGLang's attention backend `name`."""
        if writers := slot_writers(model_runner.model):
            raise PatchError(f"--kv-policy cannot serve this model: {', '.join(writers)} was imported too early")
        group, rank, size = attention_tp()
        model, pool = model_runner.model_config, arena_of(model_runner.token_to_kv_pool)
        prompt = Prompt(
            length=0,
            start=0,
            vision=(),
            num_layers=int(pool.layer_num),
            num_heads=int(model.num_attention_heads),
            num_kv_heads=int(model.get_total_num_kv_heads()),
            head_dim=int(model.head_dim),
            device=torch.device(model_runner.device),
            rotary=model_rotary(model_runner.model, pool.arena.layer_ids),
        )
        refuse_layers(
            model_runner.model,
            kept=pool.arena.layer_ids,
            heads=(prompt.num_heads // size, pool.head_num),
            widths=(pool.head_dim, pool.v_head_dim),
            context=int(model.context_len),
            window=pool.arena.window,
        )
        self._choices.serve(prompt, size)
        try:
            # One rank looks: a file may be written while the others start, and all must decide alike.
            weights = find_weights(self._config.weights, model_runner.server_args.model_path) if rank == 0 else None
            weights = weights if group is None else group.broadcast_object(weights, src=0)
            if weights is not None:
                self._choices.use_weights(weights)
        except ValueError as error:
            raise ConfigError(f"--kv-weights: {error}") from error
        allocator = model_runner.token_to_kv_pool_allocator
        heads = HeadGather(group, rank, size)
        compressor = Compressor(prompt, heads, self._counters, allocator.accounting)
        host = HostSharing.build(self._config, self._pools.host_tokens, allocator, prompt)
        if host is not None:
            compressor.host = host.memory
        backend = ResidencyBackend(model_runner, compressor, name, prompt.num_heads // size)
        backend.compile_kernels(lambda: wanted_statistics(self._choices.default.policy.needs, prompt))
        self.served = ServedModel(compressor, backend, host, model_runner.model, size)
        return backend
