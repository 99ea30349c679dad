"""Running totals of what compression has done; published in ``/server_info`` and in the metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Counters:
    """Totals since the server's start.  Cells are counted per plane, tokens per layer."""

    requests_compressed: int = 0
    requests_skipped: Counter[str] = field(default_factory=Counter)
    """By reason: ``short`` (below --kv-min-tokens), ``scope`` (no image), ``budget`` (1.0 keeps everything)."""
    policy_failures: int = 0
    cells_seen: int = 0
    cells_kept: int = 0
    seen_by_layer: list[int] = field(default_factory=list)
    kept_by_layer: list[int] = field(default_factory=list)
    prefill_ms: float = 0.0
    """Wall time of forwards that contained a compressed prompt."""
    scoring_ms: float = 0.0
    selection_ms: float = 0.0

    def skipped(self, reason: str) -> None:
        """One request is left alone."""
        self.requests_skipped[reason] += 1

    def compressed(self, kept: list[int], seen: int) -> None:
        """One prompt is compressed: `kept` cells per layer of `seen` each."""
        if not self.seen_by_layer:
            self.seen_by_layer = [0] * len(kept)
            self.kept_by_layer = [0] * len(kept)
        self.requests_compressed += 1
        self.cells_seen += seen * len(kept)
        self.cells_kept += sum(kept)
        self.seen_by_layer = [total + seen for total in self.seen_by_layer]
        self.kept_by_layer = [total + layer for total, layer in zip(self.kept_by_layer, kept, strict=True)]

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
            "prefill_ms": round(self.prefill_ms, 3),
            "scoring_ms": round(self.scoring_ms, 3),
            "selection_ms": round(self.selection_ms, 3),
        }
