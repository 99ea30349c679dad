"""One request's way to a compressed prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vlcache_sgl.api import Span
from vlcache_sgl.compression.measured import Measured
from vlcache_sgl.memory.own_slots import HostShare
from vlcache_sgl.recall.areas import RecallArea
from vlcache_sgl.scoring.asked import Asked
from vlcache_sgl.scoring.scoring import Scoring


@dataclass
class Progress:
    """How far the present prefill has come."""

    scoring: Scoring | None = None
    done: bool = False
    """Whether the decision has fallen, either way."""
    reached: int | None = None
    """Where the last chunk ended; a chunk that begins elsewhere belongs to a new prefill."""
    shared: int = 0
    """Tokens that the prefix cache served."""
    chunk: Span = field(default_factory=lambda: Span(0, 0))
    """What the present forward computes."""
    compressed: bool = False
    """Whether something was evicted from the prompt."""

    def restart(self) -> None:
        """The request was retracted and is prefilled again."""
        self.scoring = None
        self.done = self.compressed = False
        self.reached = None


@dataclass
class Staged:
    """Chunks of a prefill that read what comes before them from host memory."""

    chunks: int = 0
    tokens: int = 0
    """That were read, once per chunk."""
    ms: float = 0.0
    """Wall time of the forwards that computed the chunks, of other requests too."""

    def add(self, tokens: int, ms: float) -> None:
        """One more chunk."""
        self.chunks, self.tokens, self.ms = self.chunks + 1, self.tokens + tokens, self.ms + ms

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"chunks": self.chunks, "tokens": self.tokens, "seconds": round(self.ms / 1e3, 4)}


@dataclass
class Report:
    """What the response and the totals say of a request."""

    fields: dict[str, Any] = field(default_factory=dict)
    """What was done, for the response's metadata; the same object all along."""
    before: dict[str, Any] | None = None
    """`fields` of a prefill that had ended when the request was retracted; None: it had not."""
    counted: bool = False
    """Whether this request is among those that were compressed or left alone."""
    counted_hit: bool = False
    """Whether it is among those that found an image."""
    shared_kept: tuple[torch.Tensor, Any | None] | None = None
    """`[L]` float32 on the host, shares that each layer has of the tokens from the prefix cache, and the event after
    which it may be read."""
    staged: Staged = field(default_factory=Staged)
    measured: Measured | None = None
    """Set when the decision has fallen; only with `Asked.measures_attention`."""


@dataclass
class ReadingState:
    """How far the second reading of a request's prefix has come."""

    reader: Any = None
    """The request that reads, SGLang's object; None: nobody does."""
    key: tuple[Any, ...] = ()
    """Names the prefix."""
    tries: int = 0
    found_at: int = -1
    """`CompressedPrefixTree.removals` when the tree had the prefix."""
    report: dict[str, Any] = field(default_factory=dict)
    """What the reader did, or why there is none; empty for those who found the prefix."""

    @property
    def given_up(self) -> bool:
        return "skipped" in self.report


@dataclass(frozen=True)
class KeptState:
    """What layers without a KV cache know behind the first `end` tokens of a prompt."""

    end: int
    slot: torch.Tensor
    """`[1]`, where it lies in SGLang's pool of states."""


class CompressionJob:
    """What belongs to one request, by who changes it.

    Attributes:
        asked: what the request asks for; nobody changes it.
        progress: of the prefill, the compressor's.
        report: what is said of it.
        host: set where the prefix is shared without loss.
        area: what is brought back while the answer is decoded; None: nothing is, or not yet.
        state: of a hybrid, until the tree gets it or nobody needs it.
        reading: how far the second reading of the prompt has come, by another request; only where the policy asks.
    """

    def __init__(self, asked: Asked, reading: ReadingState | None = None) -> None:
        self.asked = asked
        self.progress = Progress()
        self.report = Report()
        self.reading = reading
        self.host: HostShare | None = None
        self.area: RecallArea | None = None
        self.state: KeptState | None = None

    @property
    def reads_decode(self) -> bool:
        """Whether decode steps of this request are looked at."""
        return self.report.measured is not None

    @property
    def recalls(self) -> RecallArea | None:
        """The area to refresh in a decode step; None: there is none, or its request has given its slots back."""
        return self.area if self.area is not None and self.host is not None and self.area.own is self.host.own else None

    @property
    def first_kept(self) -> int:
        """Where the tokens begin about which this request decides: its own, or all where nothing is lost."""
        return 0 if self.host is not None else self.progress.shared

    @property
    def publishes_cells(self) -> bool:
        """Whether other requests may come to attend to the cells of this prompt."""
        return self.host is None and self.asked.choice.share == "policy"

    def first_evictable(self) -> int:
        """Where the tokens begin that this request may evict.

        What lies in front of the first image, a system prompt for instance, is there for other images too.
        """
        return max(self.first_kept, self.asked.vision[0].begin) if self.asked.vision else self.first_kept

    def holds_back(self, up_to: int) -> bool:
        """Whether ``[0, up_to)`` must not be published yet."""
        return not self.progress.done and up_to < self.asked.end

    def publishes(self, up_to: int) -> int:
        """How much of ``[0, up_to)`` the prefix tree may have: of a second reading nothing, and nothing of a prompt
        whose compression failed in it."""
        if not self.asked.repeated:
            return up_to
        return min(up_to, self.asked.length) if self.progress.compressed else 0

    def restart(self) -> None:
        """Begin anew: the request was retracted and is prefilled again."""
        if self.progress.done:
            self.report.before = dict(self.report.fields)
        self.report.shared_kept = None
        if self.host is not None:
            self.host.restart()
        self.report.fields.clear()
        self.progress.restart()
