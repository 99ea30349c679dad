"""Our figures on SGLang's own ``/metrics``: the running totals of one scheduler, under the labels of SGLang's figures.

Nothing is measured here.  `Counters` and the allocator know everything already; `Metrics.publish` hands
prometheus_client what has changed since the last time.  It is called when SGLang publishes its own figures and when
a scheduler falls idle, never inside a forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlcache_sgl.compression.exact import HostMemory
from vlcache_sgl.counters import COUNTED, KEPT_RATIO, TOKENS_KEPT, TOKENS_SEEN, Counters, Figure
from vlcache_sgl.memory.accounting import CellAccounting
from vlcache_sgl.recall.areas import Recall

MAX_GROUPS = 4
"""Layers are reported in so many groups: one series per layer and modality would be hundreds."""
RATIO_BUCKETS = (0.01, 0.02, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Present:
    """Where a scheduler's present figures are read."""

    cells: CellAccounting
    memory: HostMemory | None
    """None: without host memory."""


@dataclass(frozen=True)
class Gauge:
    """What is there now."""

    figure: Figure
    read: Callable[[Present], int]
    in_state: str = ""
    """Its name in ``/server_info``, where it is another."""

    @property
    def key(self) -> str:
        """Its name in ``/server_info``."""
        return self.in_state or self.figure.name


PREFIX = "vlcache:"


def _of_host(read: Callable[[HostMemory], int]) -> Callable[[Present], int]:
    """0 without host memory."""
    return lambda now: 0 if now.memory is None else read(now.memory)


def _of_recall(read: Callable[[Recall], int]) -> Callable[[Present], int]:
    """0 without recall."""
    return _of_host(lambda memory: 0 if memory.recall is None else read(memory.recall))


GAUGES = (
    Gauge(
        Figure("cells_total", "gauge", "cells of the arena; a cell is one token's K and V in one layer (or KV head)"),
        lambda now: now.cells.residency.num_cells,
    ),
    Gauge(Figure("cells_used", "gauge", "cells that hold a token"), lambda now: now.cells.residency.used_cells),
    Gauge(Figure("cells_free", "gauge", "cells that hold nothing"), lambda now: now.cells.residency.free_cells),
    Gauge(
        Figure("cells_tree", "gauge", "used cells that belong to the prefix tree: shared by all requests that match"),
        lambda now: now.cells.tree_cells,
    ),
    Gauge(
        Figure("cells_evictable", "gauge", "cells of the tree that no running request relies on"),
        lambda now: now.cells.evictable_cells,
    ),
    Gauge(
        Figure("host_tokens_total", "gauge", "tokens that host memory holds; 0 without `--kv-host-memory`"),
        _of_host(lambda memory: memory.host.num_tokens),
    ),
    Gauge(
        Figure("host_tokens_used", "gauge", "tokens in host memory, each whole"),
        _of_host(lambda memory: memory.host.used_tokens),
    ),
    Gauge(
        Figure("host_bytes_per_token", "gauge", "bytes of a token in host memory"),
        _of_host(lambda memory: memory.host.token_bytes),
    ),
    Gauge(
        Figure("host_bytes_written", "gauge", "bytes copied to host memory since the start"),
        _of_host(lambda memory: memory.host.written),
    ),
    Gauge(
        Figure("host_bytes_read", "gauge", "bytes copied from host memory since the start"),
        _of_host(lambda memory: memory.host.read),
    ),
    Gauge(
        Figure("staged_tokens", "gauge", "tokens brought back for a prefill, once per forward, since the start"),
        _of_host(lambda memory: memory.staged_tokens),
    ),
    Gauge(
        Figure(
            "recalled_tokens",
            "gauge",
            "evicted tokens that decode steps have read since the start, once per step and layer (and per KV head with "
            "`--kv-head-cells`); 0 without `--kv-recall`",
        ),
        _of_recall(lambda recall: recall.recalled),
    ),
    Gauge(
        Figure("recalled_tokens_fetched", "gauge", "those of them that were copied from host memory for the step"),
        _of_recall(lambda recall: recall.fetched),
    ),
    Gauge(
        Figure("recall_sketch_bytes", "gauge", "device memory that holds the sketches of tokens in host memory"),
        _of_recall(lambda recall: recall.codes.nbytes),
    ),
    Gauge(Figure("cell_bytes", "gauge", "bytes of a cell"), lambda now: now.cells.arena.cell_bytes, "bytes_per_cell"),
    Gauge(
        Figure("cells_per_token", "gauge", "cells of an uncompressed token"),
        lambda now: now.cells.residency.num_planes,
    ),
)
FIGURES = (*COUNTED, *(gauge.figure for gauge in GAUGES))
"""Everything that is published, in the order of docs/metrics.md."""


class Metrics:
    """Publishes the totals of one scheduler process.

    Args:
        labels: those of SGLang's own figures of this scheduler.
    """

    def __init__(self, labels: Mapping[str, Any]) -> None:
        # Not before now: prometheus_client reads PROMETHEUS_MULTIPROC_DIR when it is imported, SGLang sets it at start.
        import prometheus_client

        self._labels = dict(labels)
        self._published: dict[tuple[str, ...], float] = {}
        self._metrics: dict[str, Any] = {}
        for figure in FIGURES:
            name, names = PREFIX + figure.name, (*self._labels, *figure.labels)
            if figure.kind == "counter":
                self._metrics[figure.name] = prometheus_client.Counter(name, figure.help, names)
            elif figure.kind == "gauge":
                self._metrics[figure.name] = prometheus_client.Gauge(
                    name, figure.help, names, multiprocess_mode="mostrecent"
                )
            else:
                self._metrics[figure.name] = prometheus_client.Histogram(
                    name, figure.help, names, buckets=RATIO_BUCKETS
                )
        for figure in FIGURES:
            if not figure.labels and figure.kind == "counter":
                self._raise_to(figure.name, 0.0)  # a rate over a counter that does not exist yet would miss its start

    def publish(self, counters: Counters, cells: Mapping[str, int], *, counted: bool) -> None:
        """Publish everything.

        Args:
            counters: the totals; ratios that were waiting there are taken.
            cells: values of the gauges, by their names.
            counted: whether the device has said how many vision tokens all prompts keep; modalities wait otherwise.
        """
        for (figure, labels), total in counters.totals().items():
            self._raise_to(figure.name, total, **dict(zip(figure.labels, labels, strict=True)))
        if counted:
            self._publish_tokens(TOKENS_SEEN.name, counters.seen_by_layer, counters.vision_seen_by_layer)
            self._publish_tokens(TOKENS_KEPT.name, counters.kept_by_layer, counters.vision_kept_by_layer)
        while counters.ratios:
            self._metrics[KEPT_RATIO.name].labels(**self._labels).observe(counters.ratios.popleft())
        for name, value in cells.items():
            self._metrics[name].labels(**self._labels).set(value)

    def _publish_tokens(self, name: str, both: list[int], vision: list[int]) -> None:
        for layers, part in layer_groups(len(both)).items():
            of_vision = sum(vision[part])
            self._raise_to(name, of_vision, modality="vision", layers=layers)
            self._raise_to(name, sum(both[part]) - of_vision, modality="text", layers=layers)

    def _raise_to(self, name: str, total: float, **labels: str) -> None:
        key = (name, *labels.values())
        gain = total - self._published.get(key, 0.0)
        if gain > 0 or key not in self._published:
            self._metrics[name].labels(**self._labels, **labels).inc(max(0.0, gain))
            self._published[key] = total


def layer_groups(num_layers: int) -> dict[str, slice]:
    """At most MAX_GROUPS runs of layers of nearly equal length, by the label that names them.

    >>> layer_groups(6)
    {'0': slice(0, 1, None), '1-2': slice(1, 3, None), '3': slice(3, 4, None), '4-5': slice(4, 6, None)}
    >>> layer_groups(1)
    {'0': slice(0, 1, None)}
    """
    count = min(MAX_GROUPS, num_layers)
    edges = [number * num_layers // count for number in range(count + 1)] if count else []
    return {
        str(first) if last - first == 1 else f"{first}-{last - 1}": slice(first, last)
        for first, last in itertools.pairwise(edges)
    }
