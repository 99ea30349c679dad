"""What one scheduler process tells the world: its state in ``/server_info``, its figures in ``/metrics``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlcache_sgl._version import __version__
from vlcache_sgl.compression.sharing.images import SharedImages
from vlcache_sgl.config import KVConfig
from vlcache_sgl.scoring.job import Choices
from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator
from vlcache_sgl.sglang_hooks.metrics import Metrics

if TYPE_CHECKING:
    from vlcache_sgl.compression.compressor import Compressor


class Status:
    """Everything that is shown comes from running totals and from the allocator.

    Args:
        config: the server's settings.
        default: the choice of requests that ask for nothing else.
        compressor: counts.
        allocator: slots and cells.
        images: what is shared.
        labels: those of SGLang's own figures; None: no metrics are published.
    """

    def __init__(
        self,
        config: KVConfig,
        choices: Choices,
        compressor: Compressor,
        allocator: VirtualSlotAllocator,
        images: SharedImages,
        labels: dict[str, Any] | None,
    ) -> None:
        self._config = config
        self._choices = choices
        self._compressor = compressor
        self._allocator = allocator
        self._accounting = allocator.accounting
        self._images = images
        self._metrics = None if labels is None else Metrics(labels)
        self.stale = True
        """Whether something has happened since metrics were published."""
        self._published_free = -1

    def state(self) -> dict[str, Any]:
        """What ``/server_info`` shows under ``internal_states[i].kv_policy``."""
        allocator, cells = self._allocator, self._accounting
        cells.settle()
        self._compressor.settle_counts(wait=True)
        residency = cells.residency
        slots_used = residency.num_slots - allocator.available_size()
        return {
            "version": __version__,
            "policy": self._choices.default.policy.spec,
            "budget": str(self._config.budget),
            "fingerprint": self._choices.default.fingerprint,
            "weights": None if (weights := self._choices.weights) is None else weights.digest,
            "scope": self._config.scope,
            "min_tokens": self._config.min_tokens,
            "overcommit": self._config.overcommit_factor,
            "cells_total": residency.num_cells,
            "cells_used": residency.used_cells,
            "cells_free": residency.free_cells,
            "cells_tree": cells.tree_cells,
            "cells_requests": cells.request_cells,
            "cells_evictable": cells.evictable_cells,
            # Free cells that cannot serve a token, fewer than a token needs: any cell serves any plane of any token.
            "cells_fragmented": residency.free_cells % residency.num_planes,
            # What the tokens in use would hold uncompressed is 1.
            "realised_ratio": round(residency.used_cells / max(1, slots_used * residency.num_planes), 4),
            "bytes_per_cell": cells.arena.cell_bytes,
            "cells_per_token": residency.num_planes,
            "physical_tokens_total": cells.physical_tokens,
            "virtual_slots_total": residency.num_slots,
            "virtual_slots_free": allocator.available_size(),
            "share": self._config.share,
            **self._host_figures(),
            "guard": self._config.guard,
            "pictures_known": len(self._images),
            "pictures_whole": self._images.settled,
            "sketch_bytes": self._images.sketch_bytes,
            "integrity": cells.verify(),
            **self._compressor.counters.as_dict(),
        }

    def _host_figures(self) -> dict[str, int]:
        """Of host memory, zeros where there is none."""
        memory = self._compressor.host
        host = None if memory is None else memory.host
        return {
            "host_tokens_total": 0 if host is None else host.num_tokens,
            "host_tokens_used": 0 if host is None else host.used_tokens,
            "host_bytes_per_token": 0 if host is None else host.token_bytes,
            "host_bytes_written": 0 if host is None else host.written,
            "host_bytes_read": 0 if host is None else host.read,
            "staged_tokens": 0 if memory is None else memory.staged_tokens,
        }

    def publish(self) -> None:
        """Publish all figures."""
        if self._metrics is None:
            return
        cells = self._accounting
        cells.settle()
        self._compressor.settle_counts()
        residency = cells.residency
        self._metrics.publish(
            self._compressor.counters,
            {
                "cells_total": residency.num_cells,
                "cells_used": residency.used_cells,
                "cells_free": residency.free_cells,
                "cells_tree": cells.tree_cells,
                "cells_evictable": cells.evictable_cells,
                "pictures_whole": self._images.settled,
                "sketch_bytes": self._images.sketch_bytes,
                "cell_bytes": cells.arena.cell_bytes,
                "cells_per_token": residency.num_planes,
                **self._host_figures(),
            },
            counted=self._compressor.all_counted,
        )
        self.stale = False

    def publish_when_idle(self) -> None:
        """The same, once per change."""
        if self._metrics is None:
            return
        free = self._accounting.residency.free_cells
        if self.stale or free != self._published_free:
            self._published_free = free
            self.publish()
