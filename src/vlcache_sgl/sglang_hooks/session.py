"""One scheduler process that compresses: puts together the objects that SGLang's hooks go to."""

from __future__ import annotations

import logging

from vlcache_sgl.config import ConfigError, KVConfig
from vlcache_sgl.counters import Counters
from vlcache_sgl.policy.choice import Choices
from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator
from vlcache_sgl.sglang_hooks.facades import Scheduler
from vlcache_sgl.sglang_hooks.forward import Forwards
from vlcache_sgl.sglang_hooks.model_start import ModelStart, ServedModel
from vlcache_sgl.sglang_hooks.patching import PatchError
from vlcache_sgl.sglang_hooks.pools import Pools
from vlcache_sgl.sglang_hooks.prefix_tree import CompressedPrefixTree
from vlcache_sgl.sglang_hooks.requests import Requests
from vlcache_sgl.sglang_hooks.scheduling import Scheduling
from vlcache_sgl.sglang_hooks.status import Status
from vlcache_sgl.sglang_hooks.weight_change import WeightChange

logger = logging.getLogger(__name__)


class Session:
    """Compression in one scheduler process, between SGLang's start and its end.

    Attributes:
        pools: build what keeps the KV cache.
        model: builds the attention backend.
        requests: decide what is compressed.
        forwards: watch what is computed.
        scheduling: decides what starts.
        weights: change while the model serves.
        status: says what has been done.
    """

    def __init__(self, config: KVConfig) -> None:
        self.config = config
        self.choices = Choices(config)
        counters = Counters()
        self.pools = Pools(config)
        self.model = ModelStart(config, self.choices, self.pools, counters)
        self.status = Status(config, self.choices)
        self.requests = Requests(config, self.choices, counters, self.model, self.status)
        self.forwards = Forwards(self.model, counters, self.status)
        self.scheduling = Scheduling(self.model)
        self.weights = WeightChange(self.choices, self.status)

    def check_started(self, scheduler: Scheduler) -> None:
        """After SGLang has built everything: is it built from our parts?

        Raises:
            PatchError: naming what is not ours.
        """
        served = self._require_ours(scheduler)
        if self.choices.default.policy.reads_twice and scheduler.tree_cache.disable:
            raise ConfigError(f"--kv-policy {self.config.policy} needs the prefix cache: omit --disable-radix-cache")
        if scheduler.tree_cache.disable and self.config.host_memory not in ("auto", "off"):
            raise ConfigError("--kv-host-memory needs the prefix cache: omit --disable-radix-cache")
        if served.host is not None:
            served.host.attach(scheduler.tree_cache)
        scheduler.tree_cache.row_listener = served.backend.invalidate
        self.scheduling.start(scheduler)
        reporter = scheduler.metrics_reporter
        labels = reporter.metrics_collector.labels if reporter.current_scheduler_metrics_enabled else None
        self.status.start(served.compressor, scheduler.token_to_kv_pool_allocator, labels)
        self._log_configuration(served)

    def _require_ours(self, scheduler: Scheduler) -> ServedModel:
        served = self.model.served
        attention = scheduler.tp_worker.model_runner.attn_backend
        parts = {
            "the KV allocator": isinstance(scheduler.token_to_kv_pool_allocator, VirtualSlotAllocator),
            "the prefix cache": isinstance(scheduler.tree_cache, CompressedPrefixTree),
            "the attention backend": served is not None
            and getattr(attention, "full_attn_backend", attention) is served.backend,
        }
        foreign = [name for name, ours in parts.items() if not ours]
        if served is None or foreign:
            raise PatchError(f"--kv-policy cannot serve this model: {', '.join(foreign)} is SGLang's own")
        return served

    def _log_configuration(self, served: ServedModel) -> None:
        config = self.config
        logger.info(
            "KV cache: policy %s, budget %s, prefixes shared: %s, host memory: %d tokens, model weights: %s",
            config.policy,
            config.budget,
            config.share,
            0 if (host := served.host) is None else host.memory.host.num_tokens,
            "not known" if self.choices.weights is None else self.choices.weights.digest,
        )
        if config.share == "policy" and not config.budget.keeps_all:
            logger.info(
                "What the first question about an image kept answers others badly: --kv-share exact keeps all of it in "
                "host memory, --kv-share off shares nothing"
            )
