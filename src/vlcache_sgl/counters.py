"""Running totals of what compression has done; published in ``/server_info`` and in the metrics."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

MOST_RATIOS = 4096
"""Ratios that wait for the metrics; beyond that the oldest are dropped."""


@dataclass
class Counters:
    """Totals since the server's start.  Cells are counted per plane, tokens per layer."""

    requests_compressed: int = 0
    requests_skipped: Counter[str] = field(default_factory=Counter)
    """By reason: ``short`` (below --kv-min-tokens), ``scope`` (no image), ``budget`` (1.0 keeps everything), ``recall``
    (decided on and measured, not evicted from), ``second_reading`` (what was not read twice, with a policy that
    asks for that)."""
    policy_failures: int = 0
    cells_seen: int = 0
    cells_kept: int = 0
    seen_by_layer: list[int] = field(default_factory=list)
    kept_by_layer: list[int] = field(default_factory=list)
    vision_seen_by_layer: list[int] = field(default_factory=list)
    """What of `seen_by_layer` came from images and videos; the rest is text."""
    vision_kept_by_layer: list[int] = field(default_factory=list)
    prefix_hits: int = 0
    """Prompts that found vision tokens in a compressed prefix."""
    prefix_hit_tokens: int = 0
    """Tokens of these prompts that came from the prefix."""
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_RATIOS))
    """Kept share of each compressed prompt, in [0, 1], since the metrics last took them."""
    guard_readings: int = 0
    """Questions about a shared picture whose missing attention was estimated."""
    guard_missing: float = 0.0
    """Sum of these estimates, each in [0, 1]."""
    guard_trips: int = 0
    """Readings above the threshold."""
    guard_trips_in_decode: int = 0
    """Questions whose prefill missed little, but whose first decode steps missed more than the threshold."""
    expansions: int = 0
    """Pictures computed anew because of one."""
    guard_ms: float = 0.0
    """Host time of readings of prefill rows."""
    guard_decode_ms: float = 0.0
    """The same of first decode steps."""
    second_readings: int = 0
    """Prompts, up to the end of their images, that were read twice and compressed."""
    second_reading_ms: float = 0.0
    """Wall time of forwards that contained one of them."""
    host_ms: float = 0.0
    """Host time spent on moving tokens to host memory and on mapping what is staged."""
    prefill_ms: float = 0.0
    """Wall time of forwards that contained a compressed prompt."""
    scoring_ms: float = 0.0
    selection_ms: float = 0.0

    def skipped(self, reason: str) -> None:
        """One request is left alone."""
        self.requests_skipped[reason] += 1

    def compressed(self, kept: list[int], seen: int, vision_seen: int) -> None:
        """One prompt is compressed: `kept` cells per layer of `seen` each, of which `vision_seen` are vision."""
        if not self.seen_by_layer:
            self.seen_by_layer, self.kept_by_layer = [0] * len(kept), [0] * len(kept)
            self.vision_seen_by_layer, self.vision_kept_by_layer = [0] * len(kept), [0] * len(kept)
        self.requests_compressed += 1
        self.cells_seen += seen * len(kept)
        self.cells_kept += sum(kept)
        self.seen_by_layer = [total + seen for total in self.seen_by_layer]
        self.kept_by_layer = [total + layer for total, layer in zip(self.kept_by_layer, kept, strict=True)]
        self.vision_seen_by_layer = [total + vision_seen for total in self.vision_seen_by_layer]
        self.ratios.append(sum(kept) / max(1, seen * len(kept)))

    def vision_kept(self, kept: list[int]) -> None:
        """What a compressed prompt keeps of its vision cells, per layer; on a GPU known later than the rest."""
        before = self.vision_kept_by_layer
        self.vision_kept_by_layer = [total + layer for total, layer in zip(before, kept, strict=True)]

    def prefix_hit(self, tokens: int) -> None:
        """A prompt begins with `tokens` of a compressed prefix, some of them vision."""
        self.prefix_hits += 1
        self.prefix_hit_tokens += tokens

    def guard_read(self, missing: float, tripped: bool) -> None:
        """One question would have paid the share `missing` of its attention to evicted tokens."""
        self.guard_readings += 1
        self.guard_missing += missing
        self.guard_trips += tripped

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "requests_compressed": self.requests_compressed,
            "requests_skipped": dict(self.requests_skipped),
            "policy_failures": self.policy_failures,
            "cells_seen": self.cells_seen,
            "cells_kept": self.cells_kept,
            "seen_by_layer": self.seen_by_layer,
            "kept_by_layer": self.kept_by_layer,
            "vision_seen_by_layer": self.vision_seen_by_layer,
            "vision_kept_by_layer": self.vision_kept_by_layer,
            "prefix_hits": self.prefix_hits,
            "prefix_hit_tokens": self.prefix_hit_tokens,
            "guard_readings": self.guard_readings,
            "guard_missing": round(self.guard_missing, 4),
            "guard_trips": self.guard_trips,
            "guard_trips_in_decode": self.guard_trips_in_decode,
            "expansions": self.expansions,
            "guard_ms": round(self.guard_ms, 3),
            "guard_decode_ms": round(self.guard_decode_ms, 3),
            "second_readings": self.second_readings,
            "second_reading_ms": round(self.second_reading_ms, 3),
            "host_ms": round(self.host_ms, 3),
            "prefill_ms": round(self.prefill_ms, 3),
            "scoring_ms": round(self.scoring_ms, 3),
            "selection_ms": round(self.selection_ms, 3),
        }
