"""Scoring on a GPU: one launch per layer counts the rows of all requests of a prefill batch.

Keys are read where they lie, through the residency index, so that nothing is gathered and the host never waits: what
`Scoring.observe` does per request from dense keys, for a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlcache_kernels.attention_stats import ResidencyIndex, RowBatch, StatsRequest, batch_attention_stats
from vlcache_sgl.memory.batches import ExtendRequest, Memory
from vlcache_sgl.memory.device_index import look_up
from vlcache_sgl.memory.scales import FP8
from vlcache_sgl.scoring.scoring import RowGroup, Scoring
from vlcache_sgl.streams import to_device


@dataclass(frozen=True)
class QueryRows:
    """One request's query rows of this forward, for one kind of statistics."""

    scoring: Scoring
    group: RowGroup
    request: ExtendRequest
    positions: torch.Tensor
    """`[R]` int64 on the host, absolute."""

    @property
    def visible(self) -> int:
        """Positions up to the end of the chunk; a retracted request recomputes generated tokens, which do not count."""
        return min(self.request.begin + self.request.count, self.scoring.end)

    @property
    def owned(self) -> int:
        """Keys of the request up to the end of the chunk that may be evicted, or belong to a second reading."""
        return self.visible - self.scoring.prompt.start

    @property
    def counts(self) -> bool:
        """Whether scoring has not failed meanwhile."""
        return self.scoring.failure is None


@dataclass(frozen=True)
class Poll:
    """All query rows of a batch for the same statistics: one launch per layer."""

    want: StatsRequest
    members: tuple[QueryRows, ...]
    batch: RowBatch
    rows: torch.Tensor
    """`[T]` int64 on the device: which of the batch's queries are of query rows, request after request."""
    row_index: torch.Tensor
    """`[T]` int64 on the device: the last owned key that each of them sees."""
    index: ResidencyIndex
    """Indexes of all layers: what is visible to the rows of each member, owned keys last."""

    @property
    def takes_lse(self) -> bool:
        """Whether a known log-sum-exp saves a pass over the keys."""
        return self.want.columns and self.want.density is None and not self.want.entropy


class BatchScoring:
    """What is counted in one prefill forward, planned once for all layers.

    Args:
        memory: arena, residency and rows; the new tokens' slots are in place.
        requests: the batch.
        scorings: for each of them its scoring where it has query rows in this chunk, None otherwise.
    """

    def __init__(self, memory: Memory, requests: Sequence[ExtendRequest], scorings: Sequence[Scoring | None]) -> None:
        self._memory = memory
        wanted: dict[StatsRequest, list[QueryRows]] = {}
        for request, scoring in zip(requests, scorings, strict=True):
            if scoring is None:
                continue
            for group in scoring.groups:
                positions = group.within(request.begin, request.begin + request.count)
                if positions.numel():
                    member = QueryRows(scoring, group, request, positions)
                    wanted.setdefault(group.want, []).append(member)
        self._polls = [self._poll(want, tuple(members)) for want, members in wanted.items()]

    def _poll(self, want: StatsRequest, members: tuple[QueryRows, ...]) -> Poll:
        device = self._memory.arena.device
        lengths = [member.visible for member in members]
        rows = torch.cat([v.positions - v.request.begin + v.request.tokens.start for v in members])
        row_index = torch.cat([v.positions - v.scoring.prompt.start for v in members])
        request_rows = [member.request.row for member in members]
        numbers = to_device(torch.cat([rows, row_index, torch.tensor(request_rows), torch.tensor(lengths)]), device)
        on_device = torch.split(numbers, [len(rows), len(rows), len(members), len(members)])
        return Poll(
            want=want,
            members=members,
            batch=RowBatch.build(
                [member.positions.numel() for member in members], [member.owned for member in members], lengths, device
            ),
            rows=on_device[0],
            row_index=on_device[1],
            index=look_up(self._memory, torch.int32, request_rows, lengths, on_device[2], on_device[3]),
        )

    @property
    def scorings(self) -> list[Scoring]:
        """Scorings of the requests with query rows."""
        return list({id(v.scoring): v.scoring for poll in self._polls for v in poll.members}.values())

    @property
    def takes_lse(self) -> bool:
        """Whether `observe` is faster when the attention kernel has left its log-sum-exp."""
        return any(poll.takes_lse for poll in self._polls)

    def observe(self, planes: slice, queries: torch.Tensor, scale: float, lse: torch.Tensor | None) -> None:
        """Count one layer, whose new keys are in the arena.

        Args:
            planes: the layer's planes.
            queries: `[T, H, D]` of the batch.
            scale: factor of the logits.
            lse: `[T, H]` float32, natural logarithm of the sum of exponentials of everything visible.
        """
        layer, stored = self._memory.layer_of(planes), self._memory.arena.dtype
        scale = scale * self._memory.scales_of(planes).key
        for poll in self._polls:
            if not any(member.counts for member in poll.members):
                continue
            asked = queries.index_select(0, poll.rows)
            if stored not in FP8:  # keys may be stored in another 16-bit type than queries come in
                asked = asked.to(stored)
            known = None if lse is None or not poll.takes_lse else lse.index_select(0, poll.rows).T
            found = batch_attention_stats(
                asked,
                poll.row_index,
                self._memory.arena,
                poll.index.at(layer),
                poll.batch,
                scale,
                want=poll.want,
                lse=known,
            )
            parts = torch.split(asked, list(poll.batch.rows))
            for number, (member, rows) in enumerate(zip(poll.members, parts, strict=True)):
                if member.counts:
                    member.group.add(layer, rows, found.request(number), member.owned)
