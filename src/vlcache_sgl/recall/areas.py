"""What an answer reads beside what its policy kept: the evicted tokens that each step needs, back from the host.

Every request has a recall *area*: in each plane cells for so many tokens, whose contents change from step to step.  The
cells belong to private slots of evicted tokens, so to whoever reads cells by the residency table they look like any
other part of the prompt; attention is a sum over a set, so it does not matter under which slot a token's keys and
values lie.  Before a layer attends, `Recall.refresh` ranks the evicted tokens by the sketches of their keys, and copies
those of the best that are not there yet over those that are not needed any more.  What is attended to is a function of
the step's queries alone, not of the steps before: a request that was retracted, or ran beside others, reads the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.memory.own_slots import OwnSlots
from vlcache_sgl.recall.sketch import KeySketch

EMPTY = -1
"""Entry of `RecallArea.positions` where a plane has evicted fewer tokens than the area holds: all of them are there."""


@dataclass
class RecallArea:
    """The tokens that are back, of one request."""

    own: OwnSlots
    """Of the request; its `shared` slots say where the tokens lie in host memory."""
    fixed: torch.Tensor
    """`[planes, length]` bool, tokens that cannot be recalled: kept ones, which are always there, and those that host
    memory does not have."""
    positions: torch.Tensor
    """`[planes, tokens]` int64, position in the prompt of the token that each cell holds, or EMPTY."""
    cells: torch.Tensor
    """`[planes, tokens]` int64, cells of the arena; the padding cell where EMPTY."""
    counts: list[int] = field(default_factory=list)
    """Per plane, tokens that the area holds."""
    steps: int = 0
    """Decode steps so far."""
    recalled: int = 0
    """Tokens read from the area so far, in all planes and steps."""
    fetched: int = 0
    """Those of them that had to be copied from host memory."""
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """`[length]` int64, where the prompt lies in host memory during the present step."""

    def report(self) -> dict[str, float]:
        """For the response: tokens read per layer (and KV head with cells of its own) and step, and the share of
        them that was copied from the host; the others were still there."""
        reads = self.steps * self.positions.shape[0]
        return {
            "steps": self.steps,
            "tokens": round(self.recalled / max(1, reads), 2),
            "from_host": round(self.fetched / max(1, self.recalled), 4),
        }


class Recall:
    """Recall on one rank.

    Args:
        arena: whose cells attention reads.
        host: where all tokens of a prompt lie.

    Attributes:
        codes: `[planes, rows, heads_per_cell, bytes]` uint8 on the arena's device: the sketch of each token in host
            memory, by its row there.
        recalled, fetched: as of `RecallArea`, of all requests that have ended or run.
    """

    def __init__(self, arena: Arena, host: HostPool) -> None:
        self._arena = arena
        self._host = host
        self._sketch = KeySketch(arena.head_dim, arena.device)
        shape = (arena.num_planes, host.num_tokens, arena.heads_per_cell, self._sketch.bytes)
        self.codes = torch.zeros(shape, dtype=torch.uint8, device=arena.device)
        self.recalled = self.fetched = 0

    # -- the prefill ------------------------------------------------------------------------------------------------

    def sketch(self, slots: torch.Tensor, cells: torch.Tensor) -> None:
        """Sketch the keys of tokens that have just been written to host memory.

        Args:
            slots: `[tokens]` int64.
            cells: `[planes, tokens]` int, where they are in the arena.
        """
        rows, groups = self._host.rows[slots].to(torch.int64), self._arena.groups
        for layer in range(self._arena.num_planes // groups):
            planes = self._arena.planes_at(layer)
            keys = self._arena.read(planes, cells[planes].to(torch.int64), torch.float32)[:, 0]
            codes = self._sketch.encode(keys).unflatten(1, (groups, -1))  # [tokens, G, K/G, bytes]
            self.codes[planes, rows] = codes.transpose(0, 1)

    def candidates(self, slots: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """`[planes, length]` bool: tokens that are not kept and can be brought back.

        Args:
            slots: `[length]` int64, of the prompt, as in `OwnSlots.shared`.
            keep: `[planes, length]` bool.
        """
        return ~keep & self._host.has(slots)

    @staticmethod
    def places(candidates: torch.Tensor, tokens: int) -> torch.Tensor:
        """`[planes, length]` bool: in each plane the first `tokens` candidates, under whose slots the area lies."""
        return candidates & (candidates.cumsum(1) <= tokens)

    def begin(self, own: OwnSlots, candidates: torch.Tensor, places: torch.Tensor) -> RecallArea:
        """The area of a request whose private slots have cells where `places` says; it holds the tokens of its places.

        Args:
            candidates, places: `[planes, length]` bool.
        """
        counts = places.sum(1)
        most = int(counts.max())
        order = torch.argsort(places.to(torch.int8), dim=1, descending=True, stable=True)[:, :most]
        there = torch.arange(most, device=order.device) < counts[:, None]
        cells = self._arena.residency.table[:, own.private].gather(1, order).to(torch.int64)
        return RecallArea(
            own,
            ~candidates,
            torch.where(there, order, EMPTY),
            torch.where(there, cells, 0),
            counts=counts.tolist(),
        )

    # -- decode -----------------------------------------------------------------------------------------------------

    def step(self, area: RecallArea) -> None:
        """A decode step of the area's request begins."""
        # Anew for each step: another request may have published the same tokens first, and own them now.
        area.rows = self._host.rows[area.own.shared].to(torch.int64)
        area.steps += 1

    def refresh(self, area: RecallArea, planes: slice, queries: torch.Tensor, scale: float) -> None:
        """Bring what one layer needs in this step.

        Args:
            planes: the layer's.
            queries: `[H, D]` of the step's token.
            scale: of attention.
        """
        groups = planes.stop - planes.start
        for plane, own in enumerate(queries.view(groups, -1, queries.shape[-1]), planes.start):
            count = area.counts[plane]
            if not count:
                continue
            area.recalled += count
            self.recalled += count
            if count < area.positions.shape[1]:
                continue  # all that was evicted is there
            need = self._needs(area, plane, own, scale)
            self._bring(area, plane, need.topk(count).indices)

    def _needs(self, area: RecallArea, plane: int, queries: torch.Tensor, scale: float) -> torch.Tensor:
        """`[length]` float32, attention that the prompt's tokens would get by their sketches, summed over the query
        heads `[H, D]` of a plane; higher = needed more, -1 for those that cannot be recalled."""
        codes = self.codes[plane].index_select(0, area.rows)
        logits = self._sketch.scores(queries, codes).mul_(scale)
        return logits.softmax(-1).sum(0).masked_fill_(area.fixed[plane], -1.0)

    def _bring(self, area: RecallArea, plane: int, wanted: torch.Tensor) -> None:
        """Let the area of a plane hold the tokens at `wanted` `[tokens]`."""
        held = area.positions[plane]
        marks = torch.zeros(area.fixed.shape[1], dtype=torch.int8, device=held.device)
        marks[held] = 1
        missing = wanted[marks[wanted] == 0]
        count = missing.numel()
        if not count:
            return
        marks.zero_()
        marks[wanted] = 1
        free = (marks[held] == 0).nonzero()[:, 0]
        held[free] = missing
        here = slice(plane, plane + 1)
        self._arena.raw[area.cells[plane, free]] = self._host.load(here, area.own.shared[missing])[0]
        area.fetched += count
        self.fetched += count
