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
class Voter:
    """Rows of one request that vote for one kind of statistics in this forward."""

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
    """All rows of a batch that vote for the same statistics: one launch per layer."""

    want: StatsRequest
    voters: tuple[Voter, ...]
    batch: RowBatch
    rows: torch.Tensor
    """`[T]` int64 on the device: which of the batch's queries vote, request after request."""
    row_index: torch.Tensor
    """`[T]` int64 on the device: the last owned key that each of them sees."""
    index: ResidencyIndex
    """Indexes of all layers: what is visible to each voter, owned keys last."""

    @property
    def takes_lse(self) -> bool:
        """Whether a known log-sum-exp saves a pass over the keys."""
        return self.want.columns and self.want.density is None and not self.want.entropy


class BatchScoring:
    """What is counted in one prefill forward, planned once for all layers.

    Args:
        memory: arena, residency and rows; the new tokens' slots are in place.
        requests: the batch.
        scorings: for each of them its scoring where it votes in this chunk, None otherwise.
    """

    def __init__(self, memory: Memory, requests: Sequence[ExtendRequest], scorings: Sequence[Scoring | None]) -> None:
        self._memory = memory
        wanted: dict[StatsRequest, list[Voter]] = {}
        for request, scoring in zip(requests, scorings, strict=True):
            if scoring is None:
                continue
            for group in scoring.groups:
                positions = group.within(request.begin, request.begin + request.count)
                if positions.numel():
                    voter = Voter(scoring, group, request, positions)
                    wanted.setdefault(group.want, []).append(voter)
        self._polls = [self._poll(want, tuple(voters)) for want, voters in wanted.items()]

    def _poll(self, want: StatsRequest, voters: tuple[Voter, ...]) -> Poll:
        device = self._memory.arena.device
        lengths = [voter.visible for voter in voters]
        rows = torch.cat([v.positions - v.request.begin + v.request.tokens.start for v in voters])
        row_index = torch.cat([v.positions - v.scoring.prompt.start for v in voters])
        request_rows = [voter.request.row for voter in voters]
        numbers = to_device(torch.cat([rows, row_index, torch.tensor(request_rows), torch.tensor(lengths)]), device)
        on_device = torch.split(numbers, [len(rows), len(rows), len(voters), len(voters)])
        return Poll(
            want=want,
            voters=voters,
            batch=RowBatch.build(
                [voter.positions.numel() for voter in voters], [voter.owned for voter in voters], lengths, device
            ),
            rows=on_device[0],
            row_index=on_device[1],
            index=look_up(self._memory, torch.int32, request_rows, lengths, on_device[2], on_device[3]),
        )

    @property
    def scorings(self) -> list[Scoring]:
        """Scorings of the requests that vote."""
        return list({id(v.scoring): v.scoring for poll in self._polls for v in poll.voters}.values())

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
            if not any(voter.counts for voter in poll.voters):
                continue
            voting = queries.index_select(0, poll.rows)
            if stored not in FP8:  # keys may be stored in another 16-bit type than queries come in
                voting = voting.to(stored)
            known = None if lse is None or not poll.takes_lse else lse.index_select(0, poll.rows).T
            found = batch_attention_stats(
                voting,
                poll.row_index,
                self._memory.arena,
                poll.index.at(layer),
                poll.batch,
                scale,
                want=poll.want,
                lse=known,
            )
            parts = torch.split(voting, list(poll.batch.rows))
            for number, (voter, rows) in enumerate(zip(poll.voters, parts, strict=True)):
                if voter.counts:
                    voter.group.add(layer, rows, found.request(number), voter.owned)
