"""What one scheduler process tells the world: its state in ``/server_info``, its figures in ``/metrics``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlcache_sgl._version import __version__
from vlcache_sgl.compression.compressor import Compressor
from vlcache_sgl.config import KVConfig
from vlcache_sgl.policy.choice import Choices
from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator
from vlcache_sgl.sglang_hooks.facades import StateOutput
from vlcache_sgl.sglang_hooks.metrics import GAUGES, Metrics, Present


@dataclass(frozen=True)
class _Started:
    """What there is to tell of once SGLang has built everything."""

    compressor: Compressor
    allocator: VirtualSlotAllocator
    metrics: Metrics | None
    """None: no metrics are published."""


class Status:
    """Everything that is shown comes from running totals and from the allocator.  Shows nothing until `start`.

    Args:
        config: the server's settings.
        choices: say what requests get that ask for nothing else.
    """

    def __init__(self, config: KVConfig, choices: Choices) -> None:
        self._config = config
        self._choices = choices
        self._started: _Started | None = None
        self._stale = True
        self._published_free = -1

    def start(self, compressor: Compressor, allocator: VirtualSlotAllocator, labels: dict[str, Any] | None) -> None:
        """SGLang has built everything.

        Args:
            compressor: counts.
            allocator: slots and cells.
            labels: those of SGLang's own figures; None: no metrics are published.
        """
        self._started = _Started(compressor, allocator, None if labels is None else Metrics(labels))

    def note_change(self) -> None:
        """Something has happened since metrics were published."""
        self._stale = True

    # -- hooks ------------------------------------------------------------------------------------------------------

    def add_state(self, output: StateOutput, *_: Any, **__: Any) -> None:
        """After SGLang has collected its internal state."""
        if self._started is not None:
            output.internal_state["kv_policy"] = self._state(self._started)

    def publish_metrics(self, *_: Any, **__: Any) -> None:
        """After SGLang has published its own figures."""
        started = self._started
        if started is not None and started.metrics is not None:
            self._publish(started, started.metrics)

    def publish_when_idle(self, *_: Any, **__: Any) -> None:
        """After SGLang's idle housekeeping, which spins: once per change."""
        started = self._started
        if started is None or started.metrics is None:
            return
        free = started.allocator.accounting.residency.free_cells
        if self._stale or free != self._published_free:
            self._published_free = free
            self._publish(started, started.metrics)

    # -- what they show ---------------------------------------------------------------------------------------------

    def _state(self, started: _Started) -> dict[str, Any]:
        """What ``/server_info`` shows under ``internal_states[i].kv_policy``."""
        allocator, cells = started.allocator, started.allocator.accounting
        cells.settle()
        started.compressor.settle_counts(wait=True)
        residency = cells.residency
        slots_used = residency.num_slots - allocator.available_size()
        now = self._present(started)
        return {
            "version": __version__,
            "policy": self._choices.default.policy.spec,
            "budget": str(self._config.budget),
            "fingerprint": self._choices.default.fingerprint,
            "weights": None if (weights := self._choices.weights) is None else weights.digest,
            "scope": self._config.scope,
            "layers": list(cells.arena.layer_ids),
            "min_tokens": self._config.min_tokens,
            "overcommit": self._config.overcommit_factor,
            **{gauge.key: gauge.read(now) for gauge in GAUGES},
            "cells_requests": cells.request_cells,
            # Free cells that cannot serve a token, fewer than a token needs: any cell serves any plane of any token.
            "cells_fragmented": residency.free_cells % residency.num_planes,
            # What the tokens in use would hold uncompressed is 1.
            "realised_ratio": round(residency.used_cells / max(1, slots_used * residency.num_planes), 4),
            "physical_tokens_total": cells.physical_tokens,
            "virtual_slots_total": residency.num_slots,
            "virtual_slots_free": allocator.available_size(),
            "share": self._config.share,
            "integrity": cells.verify(),
            **started.compressor.counters.as_dict(),
        }

    def _present(self, started: _Started) -> Present:
        return Present(started.allocator.accounting, started.compressor.host)

    def _publish(self, started: _Started, metrics: Metrics) -> None:
        """Publish all figures."""
        started.allocator.accounting.settle()
        started.compressor.settle_counts()
        now = self._present(started)
        metrics.publish(
            started.compressor.counters,
            {gauge.figure.name: gauge.read(now) for gauge in GAUGES},
            counted=started.compressor.all_counted,
        )
        self._stale = False
