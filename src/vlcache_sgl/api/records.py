"""Named records that plugins register, and the selection rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlcache_sgl.api.protocols import Allocator, Scorer

CHOICES = {"protect": ("none", "text"), "heads": ("shared", "split", "auto"), "reduce": ("mean", "max")}


@dataclass(frozen=True)
class Selection:
    """How scores become a kept set.  Counts are tokens of the owned range; a protected token is kept first, as far as
    the layer's budget goes: sinks and recent tokens, then text (if protected), then the rest by score."""

    sink: int = 0
    """First tokens of the prompt that are always kept; after a prefix hit they are the prefix's business."""
    recent: float = 0.0
    """Last tokens that are always kept: below 1 a share of the layer's budget (at least one), from 1 on a number."""
    protect: Literal["none", "text"] = "none"
    """``text``: evict vision tokens only, as far as the budget permits."""
    heads: Literal["shared", "split", "auto"] = "shared"
    """``shared``: one set per layer.  ``split``: an own set per KV head (needs ``--kv-head-cells``).  ``auto``: split
    where the server has cells per head, shared elsewhere; a resolved policy has one of the two."""
    reduce: Literal["mean", "max"] = "mean"
    """How scores of the KV heads become one when `heads` is ``shared``."""
    span: int = 1
    """Keep or drop whole runs of this many neighbouring tokens, by their mean score (ChunkKV)."""
    floor: float = 0.0
    """Least share of the average layer budget that every layer gets, in [0, 1]."""

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise ValueError(f"sink must be at least 0, got {self.sink}")
        if self.recent < 0 or (self.recent >= 1 and self.recent != int(self.recent)):
            raise ValueError(f"recent must be a share below 1 or a whole number of tokens, got {self.recent}")
        if self.span < 1:
            raise ValueError(f"span must be at least 1, got {self.span}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be in [0, 1], got {self.floor}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class ScorerPlugin:
    """A scorer under a name."""

    name: str
    factory: Callable[..., Scorer]
    """A frozen dataclass; its fields are the parameters."""
    paper: str = ""
    """arXiv number or other source."""
    summary: str = ""
    """The idea in one sentence."""


@dataclass(frozen=True)
class AllocatorPlugin:
    """An allocator under a name."""

    name: str
    factory: Callable[..., Allocator]
    paper: str = ""
    summary: str = ""


@dataclass(frozen=True)
class RecipePlugin:
    """A published method: scorer x allocator x selection with its defaults."""

    name: str
    scorer: str
    allocator: str
    selection: Selection = field(default_factory=Selection)
    params: Mapping[str, Any] = field(default_factory=dict)
    """Values of scorer and allocator fields that differ from their own defaults."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``name:variant`` applies these values (parameters and selection fields) as well; ``scorer`` and ``allocator``
    among them name another part, which then has its own defaults."""
    paper: str = ""
    summary: str = ""
