"""Gathers, layer by layer and chunk by chunk, what the policy of one request declared to need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from vlcache_kernels.attention_stats import AttentionStats, StatsRequest, attention_stats
from vlcache_sgl.api import LayerView, Needs, Prompt, Rows
from vlcache_sgl.api.prompt import select_rows
from vlcache_sgl.streams import to_device

KeysValues = Callable[[int], torch.Tensor]
"""Layer -> `[owned, 2, kv_heads, head_dim]`, the cached keys and values of the owned tokens."""


@dataclass
class RowGroup:
    """Scorer and allocator share a pass over the keys when they ask for the same rows."""

    positions: torch.Tensor
    """`[R]` int64 on the host, absolute and ascending."""
    want: StatsRequest
    queries: bool
    stats: dict[int, AttentionStats] = field(default_factory=dict)
    kept_queries: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Per layer, `[R_chunk, H, D]` of each chunk."""
    _on_device: torch.Tensor | None = None

    def on(self, device: torch.device) -> torch.Tensor:
        """`positions` on `device`: copied once, because all layers show them to policies."""
        if self._on_device is None or self._on_device.device != device:
            self._on_device = to_device(self.positions, device)
        return self._on_device

    def within(self, begin: int, end: int) -> torch.Tensor:
        """Those of `positions` that lie in ``[begin, end)``."""
        return self.positions[(self.positions >= begin) & (self.positions < end)]

    def add(self, layer: int, queries: torch.Tensor, stats: AttentionStats, owned: int) -> None:
        """Count the rows of one chunk.

        Args:
            queries: `[R_chunk, H, D]`.
            stats: theirs.
            owned: owned keys up to the end of the chunk.
        """
        if self.queries:
            self.kept_queries.setdefault(layer, []).append(queries)
        before = self.stats.get(layer)
        self.stats[layer] = stats if before is None else before.accumulate(stats, owned)


class Scoring:
    """The state of one request's scoring during its prefill.

    Args:
        prompt: the whole prompt; from its `start` on tokens may be evicted.
        needs: what scorer and allocator declare.
        first: position of the first token that is computed, at most ``prompt.start``; None: that.
    """

    def __init__(self, prompt: Prompt, needs: tuple[Needs, Needs], first: int | None = None) -> None:
        self.prompt = prompt
        self._front = 0 if first is None else prompt.start - first
        self.needs = needs
        self.end = prompt.length + prompt.repeated
        """Keys up to here are counted: a second reading attends to itself, too."""
        self.failure: Exception | None = None
        """Why nothing more is counted; the decision then falls against compression."""
        self._groups: dict[Rows, RowGroup] = {}
        self._positions: list[torch.Tensor] | None = [] if any(need.rotary for need in needs) else None
        for need in needs:
            if need.rows.kind == "none" or not (need.reads_attention or need.queries):
                continue
            want = StatsRequest(
                column_sum=need.column_sum,
                column_square_sum=need.column_square_sum,
                column_max=need.column_max,
                density=need.density,
                entropy=need.entropy,
                probabilities=need.probabilities,
            )
            known = self._groups.get(need.rows)
            if known is None:
                positions = torch.arange(*select_rows(need.rows, prompt))
                self._groups[need.rows] = RowGroup(positions, want, need.queries)
            else:
                known.want = _union(known.want, want)
                known.queries = known.queries or need.queries

    def add_positions(self, positions: torch.Tensor) -> None:
        """Rotary positions of the next chunk's tokens, `[t]` or `[3, t]`; kept only where a policy needs queries."""
        if self._positions is not None:
            self._positions.append(positions)

    def final_prompt(self) -> Prompt:
        """The prompt, with the rotary positions of its owned tokens if a policy needs them."""
        if not self._positions:
            return self.prompt
        own = torch.cat(self._positions, dim=-1)[..., self._front :]
        return replace(self.prompt, positions=own[..., : self.prompt.owned])

    def rows_in(self, begin: int, end: int) -> bool:
        """Whether any query row lies in ``[begin, end)``: otherwise a chunk need not be observed."""
        return self.failure is None and any(group.within(begin, end).numel() for group in self._groups.values())

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        """What is counted, at most one group for the scorer and one for the allocator."""
        return tuple(self._groups.values())

    def observe(
        self,
        layer: int,
        begin: int,
        queries: torch.Tensor,
        owned_keys: torch.Tensor,
        prefix_keys: torch.Tensor | None,
        prefix_valid: torch.Tensor | None,
        scale: float,
    ) -> None:
        """Count the rows of one chunk in one layer, from dense keys; on a GPU see `batch_scoring`.

        Args:
            layer: layer number.
            begin: absolute position of the chunk's first token.
            queries: `[t, H, D]`, the chunk's queries.
            owned_keys: `[m, K, D]`, keys of positions ``[start, begin + t)``, those of a second reading included.
            prefix_keys: `[P, K, D]`, what the layer still has of ``[0, start)``.
            prefix_valid: `[K]`, leading entries of it that exist per KV head; None = all `P`.
            scale: factor of the logits.
        """
        start = self.prompt.start
        for group in self._groups.values():
            positions = group.within(begin, begin + queries.shape[0]).to(queries.device)
            if positions.numel() == 0:
                continue
            rows = queries[positions - begin]
            stats = attention_stats(
                rows,
                owned_keys,
                positions - start,
                scale,
                want=group.want,
                prefix_keys=prefix_keys,
                prefix_valid=prefix_valid,
            )
            group.add(layer, rows, stats, owned_keys.shape[0])

    def count_rows(self, need: Needs) -> int:
        """Query rows of a scorer or allocator with these needs."""
        group = self._groups.get(need.rows)
        return 0 if group is None else group.positions.numel()

    def views(self, keys_values: KeysValues) -> tuple[list[LayerView], list[LayerView]]:
        """What scorer and allocator get to see, one view per layer each."""
        scorer, allocator = self.needs
        layers = range(self.prompt.num_layers)
        return (
            [self._view(layer, scorer, keys_values) for layer in layers],
            [self._view(layer, allocator, keys_values) for layer in layers],
        )

    def _view(self, layer: int, need: Needs, keys_values: KeysValues) -> LayerView:
        view = LayerView(index=layer)
        group = self._groups.get(need.rows)
        if group is not None:
            view.row_positions = group.on(self.prompt.device)
            view = self._with_stats(view, group.stats.get(layer), need)
            if need.queries:
                kept = group.kept_queries.get(layer, [])
                view.queries = torch.cat(kept).transpose(0, 1) if kept else None
        if need.keys or need.values:
            both = keys_values(layer)
            view.keys = both[:, 0].transpose(0, 1) if need.keys else None
            view.values = both[:, 1].transpose(0, 1) if need.values else None
        return view

    def _with_stats(self, view: LayerView, stats: AttentionStats | None, need: Needs) -> LayerView:
        if stats is None:
            return view
        # Rows of an early chunk did not see later keys: their probability there is 0.
        stats = stats.accumulate(_nothing_like(stats), self.end - self.prompt.start)
        return replace(
            view,
            column_sum=self._owned(stats.column_sum) if need.column_sum else None,
            column_square_sum=self._owned(stats.column_square_sum) if need.column_square_sum else None,
            column_max=self._owned(stats.column_max) if need.column_max else None,
            density=stats.density if need.density is not None else None,
            entropy=stats.entropy if need.entropy else None,
            probabilities=self._owned(stats.probabilities) if need.probabilities else None,
        )

    def _owned(self, columns: torch.Tensor | None) -> torch.Tensor | None:
        """Without the columns of a second reading, whose keys are dropped anyway."""
        return None if columns is None else columns[..., : self.prompt.owned]


def wanted_statistics(needs: tuple[Needs, Needs], model: Prompt) -> list[StatsRequest]:
    """What a scorer and an allocator with these needs ask to be counted of every prompt of a model."""
    prompt = replace(model, length=2, start=0, repeated=1)
    return [group.want for group in Scoring(prompt, needs).groups]


def _union(a: StatsRequest, b: StatsRequest) -> StatsRequest:
    if None not in (a.density, b.density) and a.density != b.density:
        raise ValueError(f"scorer and allocator ask for different density thresholds: {a.density} and {b.density}")
    return StatsRequest(
        column_sum=a.column_sum or b.column_sum,
        column_square_sum=a.column_square_sum or b.column_square_sum,
        column_max=a.column_max or b.column_max,
        density=a.density if a.density is not None else b.density,
        entropy=a.entropy or b.entropy,
        probabilities=a.probabilities or b.probabilities,
    )


def _nothing_like(stats: AttentionStats) -> AttentionStats:
    """Statistics of no rows with the fields that `stats` has."""

    def empty(x: torch.Tensor | None, dim: int = -1) -> torch.Tensor | None:
        return None if x is None else x.narrow(dim, 0, 0)

    def zero(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else torch.zeros_like(x)

    return AttentionStats(
        rows=0,
        column_sum=empty(stats.column_sum),
        column_square_sum=empty(stats.column_square_sum),
        column_max=empty(stats.column_max),
        kept=zero(stats.kept),
        visible=zero(stats.visible),
        entropy_sum=zero(stats.entropy_sum),
        probabilities=None if stats.probabilities is None else stats.probabilities.narrow(1, 0, 0),
    )


def divide_prefix(
    prefix: torch.Tensor | None, valid: torch.Tensor | None, earlier: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Kept keys before a chunk, divided into what the prefix cache served and the last `earlier`, which are owned.

    Returns:
        `[S, K, D]` shared keys or None, `[K]` how many of them exist per KV head or None for all, and `[earlier, K, D]`
        owned keys or None.
    """
    if prefix is None:
        return None, None, None
    keys = prefix[:, 0]
    if valid is None:
        split = keys.shape[0] - earlier
        return keys[:split] if split else None, None, keys[split:] if earlier else None
    # Heads that were evicted separately: each has its owned keys behind its own number of shared ones.
    split_by_head = valid.to(torch.int64) - earlier
    at = split_by_head + torch.arange(earlier, device=keys.device)[:, None]
    own = keys.gather(0, at[..., None].expand(-1, -1, keys.shape[2])) if earlier else None
    return keys[: keys.shape[0] - earlier], split_by_head, own
