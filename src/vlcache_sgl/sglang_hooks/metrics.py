"""Our figures on SGLang's own ``/metrics``: the running totals of one scheduler, under the labels of SGLang's figures.

Nothing is measured here.  `Counters` and the allocator know everything already; `Metrics.publish` hands
prometheus_client what has changed since the last time.  It is called when SGLang publishes its own figures and when
a scheduler falls idle, never inside a forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlcache_sgl.counters import Counters

MOST_GROUPS = 4
"""Layers are reported in so many groups: one series per layer and modality would be hundreds."""
RATIO_BUCKETS = (0.01, 0.02, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Figure:
    """One metric, without its prefix."""

    name: str
    kind: str
    """``counter``, ``gauge`` or ``histogram``."""
    text: str
    labels: tuple[str, ...] = ()
    """Beside the labels that SGLang's own figures have."""


PREFIX = "vlcache:"
FIGURES = (
    Figure("requests_compressed", "counter", "Prompts that were compressed."),
    Figure(
        "requests_skipped",
        "counter",
        "Prompts left alone, by reason: short (below --kv-min-tokens), scope (no image), budget (1.0), "
        "recall (measured only), second_reading (not read twice).",
        ("reason",),
    ),
    Figure("policy_failures", "counter", "Prompts that keep their full cache because the policy failed on them."),
    Figure(
        "tokens_seen",
        "counter",
        "Tokens of compressed prompts, once per layer (and per KV head with --kv-head-cells).",
        ("modality", "layers"),
    ),
    Figure("tokens_kept", "counter", "What was kept of vlcache:tokens_seen.", ("modality", "layers")),
    Figure("kept_ratio", "histogram", "Kept share of a compressed prompt's own tokens, in [0, 1]."),
    Figure("prefix_hits", "counter", "Prompts that found vision tokens in a compressed prefix."),
    Figure("prefix_hit_tokens", "counter", "Tokens of these prompts that came from the prefix."),
    Figure("guard_readings", "counter", "Questions about a shared picture whose missing attention was estimated."),
    Figure("guard_missing", "counter", "Sum of these estimates, each a share in [0, 1]."),
    Figure(
        "guard_trips",
        "counter",
        "Questions that missed more than --kv-guard-threshold, by where it was seen: prefill, or only decode.",
        ("seen_in",),
    ),
    Figure("expansions", "counter", "Pictures computed anew because of one; several trips may share one."),
    Figure("guard_seconds", "counter", "Host time spent on guard readings, within forwards."),
    Figure("second_readings", "counter", "Prompts that were read twice, for policies that ask for that."),
    Figure("second_reading_seconds", "counter", "Wall time of forwards that contained one of them."),
    Figure("prefill_seconds", "counter", "Wall time of forwards that contained a compressed prompt."),
    Figure("scoring_seconds", "counter", "Host time spent on scoring, within vlcache:prefill_seconds."),
    Figure("selection_seconds", "counter", "Host time spent on budgets, selection and eviction, likewise."),
    Figure("cells_total", "gauge", "Cells of the arena; a cell is one token's K and V in one layer (or KV head)."),
    Figure("cells_used", "gauge", "Cells that hold a token."),
    Figure("cells_free", "gauge", "Cells that hold nothing."),
    Figure("cells_tree", "gauge", "Used cells that belong to the prefix tree, hence shared by all who match."),
    Figure("cells_evictable", "gauge", "Cells of the prefix tree that no running request relies on."),
    Figure("pictures_whole", "gauge", "Pictures that are shared uncompressed: too many questions missed parts."),
    Figure("sketch_bytes", "gauge", "Bytes of the sketches of evicted keys that guards read."),
    Figure("host_tokens_total", "gauge", "Tokens that host memory holds; 0 without --kv-host-memory."),
    Figure("host_tokens_used", "gauge", "Tokens in host memory, each whole."),
    Figure("host_bytes_per_token", "gauge", "Bytes of a token in host memory."),
    Figure("host_bytes_written", "gauge", "Bytes copied to host memory since the start."),
    Figure("host_bytes_read", "gauge", "Bytes copied from host memory since the start."),
    Figure("staged_tokens", "gauge", "Tokens brought back for a prefill, once per forward, since the start."),
    Figure("cell_bytes", "gauge", "Bytes of a cell."),
    Figure("cells_per_token", "gauge", "Cells of an uncompressed token."),
)
"""Everything that is published; docs/metrics.md explains it and a test compares the two."""


class Metrics:
    """Publishes the totals of one scheduler process.

    Args:
        labels: those of SGLang's own figures of this scheduler.
    """

    def __init__(self, labels: Mapping[str, Any]) -> None:
        # Not before now: prometheus_client reads PROMETHEUS_MULTIPROC_DIR when it is imported, SGLang sets it at start.
        from prometheus_client import Counter, Gauge, Histogram

        self._labels = dict(labels)
        self._published: dict[tuple[str, ...], float] = {}
        self._metrics: dict[str, Any] = {}
        for figure in FIGURES:
            name, names = PREFIX + figure.name, (*self._labels, *figure.labels)
            if figure.kind == "counter":
                self._metrics[figure.name] = Counter(name, figure.text, names)
            elif figure.kind == "gauge":
                self._metrics[figure.name] = Gauge(name, figure.text, names, multiprocess_mode="mostrecent")
            else:
                self._metrics[figure.name] = Histogram(name, figure.text, names, buckets=RATIO_BUCKETS)
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
        self._raise_to("requests_compressed", counters.requests_compressed)
        for reason, count in counters.requests_skipped.items():
            self._raise_to("requests_skipped", count, reason=reason)
        self._raise_to("policy_failures", counters.policy_failures)
        self._raise_to("prefix_hits", counters.prefix_hits)
        self._raise_to("prefix_hit_tokens", counters.prefix_hit_tokens)
        self._raise_to("guard_readings", counters.guard_readings)
        self._raise_to("guard_missing", counters.guard_missing)
        self._raise_to("guard_trips", counters.guard_trips, seen_in="prefill")
        self._raise_to("guard_trips", counters.guard_trips_in_decode, seen_in="decode")
        self._raise_to("expansions", counters.expansions)
        self._raise_to("guard_seconds", (counters.guard_ms + counters.guard_decode_ms) / 1e3)
        self._raise_to("second_readings", counters.second_readings)
        self._raise_to("second_reading_seconds", counters.second_reading_ms / 1e3)
        self._raise_to("prefill_seconds", counters.prefill_ms / 1e3)
        self._raise_to("scoring_seconds", counters.scoring_ms / 1e3)
        self._raise_to("selection_seconds", counters.selection_ms / 1e3)
        if counted:
            self._publish_tokens("tokens_seen", counters.seen_by_layer, counters.vision_seen_by_layer)
            self._publish_tokens("tokens_kept", counters.kept_by_layer, counters.vision_kept_by_layer)
        while counters.ratios:
            self._metrics["kept_ratio"].labels(**self._labels).observe(counters.ratios.popleft())
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
    """At most MOST_GROUPS runs of layers of nearly equal length, by the label that names them.

    >>> layer_groups(6)
    {'0': slice(0, 1, None), '1-2': slice(1, 3, None), '3': slice(3, 4, None), '4-5': slice(4, 6, None)}
    >>> layer_groups(1)
    {'0': slice(0, 1, None)}
    """
    count = min(MOST_GROUPS, num_layers)
    edges = [number * num_layers // count for number in range(count + 1)] if count else []
    return {
        str(first) if last - first == 1 else f"{first}-{last - 1}": slice(first, last)
        for first, last in itertools.pairwise(edges)
    }
