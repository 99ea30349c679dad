"""Running totals of what compression has done; published in ``/server_info`` and in the metrics."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

MAX_RATIOS = 4096
"""Ratios that wait for the metrics; beyond that the oldest are dropped."""


Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Figure:
    """One metric, as it is published and documented."""

    name: str
    """Without prefix, and without the ending that its kind has."""
    kind: Kind
    text: str
    """What it counts: part of a sentence, in Markdown."""
    labels: tuple[str, ...] = ()
    """Beside the labels that SGLang's own figures have."""

    @property
    def help(self) -> str:
        """The same as a sentence of plain text."""
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", self.text).replace("`", "")
        return f"{plain[0].upper()}{plain[1:]}."


@dataclass(frozen=True)
class Published:
    """How a field of `Counters` becomes a metric."""

    figure: Figure
    labels: tuple[str, ...] = ()
    """Values of the figure's labels, where the field is one of its series."""
    unit: float = 1.0
    """What the field counts of the metric's units, inverse: 1000 for milliseconds in seconds."""


PUBLISHED = "published"
DIGITS = "digits"


def count(figure: Figure | None = None, *labels: str) -> Any:
    """A field that counts whole things; without a figure it is in ``/server_info`` only."""
    return field(default=0, metadata={} if figure is None else {PUBLISHED: Published(figure, labels)})


def time_ms(figure: Figure | None = None) -> Any:
    """A field in milliseconds, published in seconds; several fields of one figure are added up."""
    shown: dict[str, Any] = {DIGITS: 3}
    return field(default=0.0, metadata=shown if figure is None else {**shown, PUBLISHED: Published(figure, unit=1e3)})


def published(figure: Figure) -> Mapping[str, Published]:
    """Metadata of a field that holds more than a number."""
    return {PUBLISHED: Published(figure)}


REQUESTS_SKIPPED = Figure(
    "requests_skipped",
    "counter",
    "prompts left alone: `short` (fewer new tokens than `--kv-min-tokens`, as in a follow-up question), `scope` (no "
    "image), `embeds` (`input_embeds`, in which nobody says where images lie), `budget` (1.0 was asked for), "
    "`measured` (only measured, see below), `second_reading` (not read twice, with a policy that "
    "[asks for that](policies.md#a-second-reading))",
    ("reason",),
)
TOKENS_SEEN = Figure(
    "tokens_seen",
    "counter",
    "tokens of compressed prompts, once per layer (and per KV head with `--kv-head-cells`)",
    (
        "modality",
        "layers",
    ),
)
TOKENS_KEPT = Figure(
    "tokens_kept",
    "counter",
    "what was kept of them",
    (
        "modality",
        "layers",
    ),
)
KEPT_RATIO = Figure("kept_ratio", "histogram", "kept share of a compressed prompt's own tokens")


@dataclass
class Counters:
    """Totals since the server's start.  Cells are counted per plane, tokens per layer.

    Each field is declared once: ``/server_info``, the metrics and the table in docs/metrics.md follow from here.
    """

    requests_compressed: int = count(Figure("requests_compressed", "counter", "prompts that were compressed"))
    requests_skipped: Counter[str] = field(default_factory=Counter, metadata=published(REQUESTS_SKIPPED))
    policy_failures: int = count(
        Figure(
            "policy_failures",
            "counter",
            "prompts that keep their full cache because the policy failed on them; the log names it",
        )
    )
    cells_seen: int = count()
    cells_kept: int = count()
    seen_by_layer: list[int] = field(default_factory=list, metadata=published(TOKENS_SEEN))
    kept_by_layer: list[int] = field(default_factory=list, metadata=published(TOKENS_KEPT))
    vision_seen_by_layer: list[int] = field(default_factory=list)
    """What of `seen_by_layer` came from images and videos; the rest is text."""
    vision_kept_by_layer: list[int] = field(default_factory=list)
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RATIOS), metadata=published(KEPT_RATIO))
    """Kept share of each compressed prompt, in [0, 1], since the metrics last took them; not in ``/server_info``."""
    prefix_hits: int = count(
        Figure("prefix_hits", "counter", "prompts that found vision tokens in a compressed prefix")
    )
    prefix_hit_tokens: int = count(
        Figure("prefix_hit_tokens", "counter", "tokens of these prompts that came from the prefix")
    )
    second_readings: int = count(
        Figure(
            "second_readings",
            "counter",
            "prompts that were read twice, for policies that [ask for that](policies.md#a-second-reading)",
        )
    )
    second_reading_ms: float = time_ms(
        Figure("second_reading_seconds", "counter", "wall time of forwards that contained one of them")
    )
    staged_forwards: int = count(
        Figure(
            "staged_forwards",
            "counter",
            "prefill forwards, a chunk of one or more prompts each, that read a prefix from host memory",
        )
    )
    staged_ms: float = time_ms(
        Figure("staged_forward_seconds", "counter", "wall time of these forwards, copies included")
    )
    host_ms: float = time_ms(
        Figure(
            "host_memory_seconds",
            "counter",
            "host time spent on copies to host memory and on mapping what is staged, within prefill forwards",
        )
    )
    prefill_ms: float = time_ms(
        Figure("prefill_seconds", "counter", "wall time of forwards that contained a compressed prompt")
    )
    scoring_ms: float = time_ms(
        Figure("scoring_seconds", "counter", "host time spent on scoring, within these forwards")
    )
    selection_ms: float = time_ms(
        Figure("selection_seconds", "counter", "host time spent on budgets, selection and eviction, likewise")
    )

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

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: ``/server_info``."""
        return {one.name: _shown(getattr(self, one.name), one.metadata) for one in fields(self) if one.name != "ratios"}

    def totals(self) -> dict[tuple[Figure, tuple[str, ...]], float]:
        """What has been counted one by one, by figure and values of its labels; layers and ratios are left out."""
        found: dict[tuple[Figure, tuple[str, ...]], float] = {}
        for one in fields(self):
            how: Published | None = one.metadata.get(PUBLISHED)
            value = getattr(self, one.name)
            if how is None or isinstance(value, (list, deque)):
                continue
            series = value.items() if isinstance(value, Counter) else [(None, value)]
            for label, total in series:
                key = (how.figure, how.labels if label is None else (label,))
                found[key] = found.get(key, 0.0) + total / how.unit
        return found


def _shown(value: Any, metadata: Mapping[str, Any]) -> Any:
    if isinstance(value, Counter):
        return dict(value)
    return round(value, metadata[DIGITS]) if DIGITS in metadata else value


COUNTED = tuple(dict.fromkeys(one.metadata[PUBLISHED].figure for one in fields(Counters) if PUBLISHED in one.metadata))
"""Figures of `Counters`, in order."""
