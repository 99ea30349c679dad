"""What is asked of, and returned by, `attention_stats`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True)
class StatsRequest:
    """Which statistics to compute; nothing else is."""

    column_sum: bool = False
    column_square_sum: bool = False
    column_max: bool = False
    density: float | None = None
    """Relative threshold p in (0, 1]: count entries at least p times their row maximum (2410.23317, eq. 1)."""
    entropy: bool = False
    probabilities: bool = False

    def __post_init__(self) -> None:
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ValueError(f"density threshold must be in (0, 1], got {self.density}")

    @property
    def columns(self) -> bool:
        """Whether any statistic per key is asked for."""
        return self.column_sum or self.column_square_sum or self.column_max or self.probabilities


@dataclass(frozen=True)
class AttentionStats:
    """Statistics of one layer of one request; what was not asked for is None.

    `K` KV heads, `H` query heads, `R` rows, `m` owned keys.  Probabilities are softmax over all visible keys.  The
    `g = H / K` query heads of a KV head are reduced by mean, `column_max` by max.
    """

    rows: int
    """`R`, query rows."""
    column_sum: torch.Tensor | None = None
    """`[K, m]` float32: sum over rows of the probability of each owned key."""
    column_square_sum: torch.Tensor | None = None
    """`[K, m]` float32: sum over rows of the squared probability."""
    column_max: torch.Tensor | None = None
    """`[K, m]` float32: maximum over rows and query heads."""
    kept: torch.Tensor | None = None
    """`[K]` int64: entries that pass the density threshold, prefix included, counted over rows and query heads."""
    visible: torch.Tensor | None = None
    """`[K]` int64: entries that the rows may see, prefix included, counted alike; ``density = kept / visible``."""
    entropy_sum: torch.Tensor | None = None
    """`[K]` float32, nats: sum over rows of the entropy of a row."""
    probabilities: torch.Tensor | None = None
    """`[H, R, m]` float32, entries of future keys are 0."""

    @property
    def density(self) -> torch.Tensor | None:
        """`[K]` float32 in [0, 1]: kept share of the visible entries."""
        if self.kept is None or self.visible is None:
            return None
        return (self.kept.double() / self.visible.clamp(min=1)).float()

    @property
    def entropy(self) -> torch.Tensor | None:
        """`[K]` float32, nats: mean over rows."""
        return None if self.entropy_sum is None else self.entropy_sum / max(1, self.rows)

    def accumulate(self, other: AttentionStats, width: int) -> AttentionStats:
        """The statistics of both row sets together; neither operand is changed.

        Chunked prefill: rows are independent, so sums and counts add up.  A later chunk owns more keys, so columns
        are padded with zeros up to `width` owned keys: an earlier row gives a future key probability 0.

        Args:
            other: statistics of other rows of the same request and layer, same fields; its rows come after ours.
            width: owned keys of the result, at least those of either operand.
        """

        def padded(x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] > width:
                raise ValueError(f"width {width} is less than the {x.shape[-1]} owned keys seen so far")
            return torch.nn.functional.pad(x, (0, width - x.shape[-1]))

        def columns(name: str, join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
            pair = both(name)
            return None if pair is None else join(padded(pair[0]), padded(pair[1]))

        def counts(name: str) -> torch.Tensor | None:
            pair = both(name)
            return None if pair is None else pair[0] + pair[1]

        def both(name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"cannot accumulate: only one of the two has {name}")
            return None if mine is None else (mine, theirs)

        return AttentionStats(
            rows=self.rows + other.rows,
            column_sum=columns("column_sum", torch.add),
            column_square_sum=columns("column_square_sum", torch.add),
            column_max=columns("column_max", torch.maximum),
            kept=counts("kept"),
            visible=counts("visible"),
            entropy_sum=counts("entropy_sum"),
            probabilities=columns("probabilities", lambda a, b: torch.cat([a, b], dim=1)),
        )


@dataclass(frozen=True)
class RowBatch:
    """How the rows and owned keys of several requests lie one after the other; made once per forward, for all layers.

    Host numbers fix grids and output sizes; the tensors are what the kernels read.
    """

    rows: tuple[int, ...]
    """`[B]`, query rows, by request."""
    owned: tuple[int, ...]
    """`[B]`, owned keys: those that may be evicted."""
    max_visible: int
    """Bound on the visible keys of any request, prefix and owned."""
    row_indptr: torch.Tensor
    """`[B + 1]` int32 on the device: request b has rows ``[row_indptr[b], row_indptr[b + 1])``."""
    owned_indptr: torch.Tensor
    """`[B + 1]` int32 on the device: its columns in the flat outputs."""

    @classmethod
    def build(
        cls, rows: Sequence[int], owned: Sequence[int], visible: Sequence[int], device: torch.device | str
    ) -> RowBatch:
        """`rows`, `owned`, `visible` (a bound, for instance the sequence length) by request, all known on the host."""
        if not len(rows) == len(owned) == len(visible) or not rows:
            raise ValueError(f"{len(rows)} row, {len(owned)} owned and {len(visible)} visible counts: need one batch")
        if any(v < o for v, o in zip(visible, owned, strict=True)):
            raise ValueError(f"visible keys {list(visible)} are fewer than owned keys {list(owned)}")
        pointers = torch.tensor([0, *accumulate(rows), 0, *accumulate(owned)], dtype=torch.int32)
        if torch.device(device).type == "cuda":  # pinned, so that the copy does not wait for the stream
            pointers = pointers.pin_memory().to(device, non_blocking=True)
        row_indptr, owned_indptr = pointers.view(2, len(rows) + 1).unbind()
        return cls(tuple(rows), tuple(owned), max(visible), row_indptr, owned_indptr)

    @property
    def row_total(self) -> int:
        """`T`, rows of all requests."""
        return sum(self.rows)

    def columns(self, b: int) -> slice:
        """Where request b lies in the flat columns."""
        begin = sum(self.owned[:b])
        return slice(begin, begin + self.owned[b])


@dataclass(frozen=True)
class BatchStats:
    """`AttentionStats` of a batch, flat: columns of all requests one after the other, `M = sum(batch.owned)`."""

    batch: RowBatch
    column_sum: torch.Tensor | None = None
    """`[K, M]` float32."""
    column_square_sum: torch.Tensor | None = None
    """`[K, M]` float32."""
    column_max: torch.Tensor | None = None
    """`[K, M]` float32."""
    kept: torch.Tensor | None = None
    """`[K, B]` int64."""
    visible: torch.Tensor | None = None
    """`[K, B]` int64."""
    entropy_sum: torch.Tensor | None = None
    """`[K, B]` float32."""
    probabilities: tuple[torch.Tensor, ...] | None = None
    """By request, `[H, R, m]` float32."""

    def request(self, b: int) -> AttentionStats:
        """The statistics of one request: views, no copies."""
        columns = self.batch.columns(b)

        def part(x: torch.Tensor | None, where: int | slice) -> torch.Tensor | None:
            return None if x is None else x[:, where]

        return AttentionStats(
            rows=self.batch.rows[b],
            column_sum=part(self.column_sum, columns),
            column_square_sum=part(self.column_square_sum, columns),
            column_max=part(self.column_max, columns),
            kept=part(self.kept, b),
            visible=part(self.visible, b),
            entropy_sum=part(self.entropy_sum, b),
            probabilities=None if self.probabilities is None else self.probabilities[b],
        )

    @classmethod
    def join(cls, found: Sequence[AttentionStats], batch: RowBatch) -> BatchStats:
        """The inverse of `request`: one batch of separately computed statistics."""

        def flat(name: str) -> torch.Tensor | None:
            parts = [getattr(stats, name) for stats in found]
            if parts[0] is None:
                return None
            return torch.cat(parts, dim=1) if parts[0].dim() == 2 else torch.stack(parts, dim=1)

        names = ("column_sum", "column_square_sum", "column_max", "kept", "visible", "entropy_sum")
        probabilities = [stats.probabilities for stats in found if stats.probabilities is not None]
        return cls(batch, **{name: flat(name) for name in names}, probabilities=tuple(probabilities) or None)
