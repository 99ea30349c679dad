"""What an answer reads beside what its policy kept: the evicted tokens that each step needs, back from the host.

Every request has a recall *area*: in each plane cells for so many tokens, whose contents change from step to step.  The
cells belong to private slots of evicted tokens, so to whoever reads cells by the residency table they look like any
other part of the prompt; attention is a sum over a set, so it does not matter under which slot a token's keys and
values lie.  Before a layer attends, `Recall.refresh` ranks the evicted tokens by the sketches of their keys, and copies
those of the best that are not there yet over those that are not needed any more.  What is attended to is a function of
the step's queries alone, not of the steps before: a request that was retracted, or ran beside others, reads the same.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.memory.own_slots import OwnSlots
from vlcache_sgl.memory.residency import PADDING
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
    """`[planes, tokens]` int64, cells of the arena; -1 where EMPTY."""
    fetched: torch.Tensor
    """`[]` int64 on the device, tokens copied from host memory so far, in all planes and steps."""
    steps: int = 0
    """Decode steps so far."""

    def report(self) -> dict[str, float]:
        """For the response: tokens read per layer (and KV head with cells of its own) and step, and the share of them
        that was copied from the host for the step; the others were still there.  Waits for the device."""
        planes, held = len(self.positions), int((self.positions != EMPTY).sum())
        return {
            "steps": self.steps,
            "tokens": round(held / planes, 2),
            "from_host": round(int(self.fetched) / max(1, held * self.steps), 4),
        }


class AreaBatch:
    """The areas of the requests that one decode step computes, side by side.

    From now on the areas' own tensors are parts of this one's, so that a step's changes are theirs.

    Attributes:
        shared: `[B, n]` int64, slots of the prompts; the padding slot behind the shorter ones.
        rows: `[B, n]` int64, rows of host memory, 0 there.
        fixed: `[planes, B, n]` bool, set there.
        positions, cells: `[planes, B, tokens]` int64.
        fetched: `[B]` int64.
    """

    def __init__(self, areas: Sequence[RecallArea]) -> None:
        self.areas = tuple(areas)
        length = max(area.fixed.shape[1] for area in areas)
        tokens = max(area.positions.shape[1] for area in areas)
        self.fixed = torch.stack([_widened(area.fixed, length, True) for area in areas], dim=1)
        self.positions = torch.stack([_widened(area.positions, tokens, EMPTY) for area in areas], dim=1)
        self.cells = torch.stack([_widened(area.cells, tokens, -1) for area in areas], dim=1)
        self.fetched = torch.stack([area.fetched for area in areas])
        self.held = self.positions != EMPTY
        self.shared = self.rows = torch.empty(0, dtype=torch.int64)
        self._named: list[torch.Tensor] = []
        for number, area in enumerate(areas):
            area.positions = self.positions[:, number, : area.positions.shape[1]]
            area.fetched = self.fetched[number]

    def step(self, host: HostPool) -> None:
        """A decode step begins."""
        for area in self.areas:
            area.steps += 1
        named = [area.own.shared for area in self.areas]
        if len(named) == len(self._named) and all(map(operator.is_, named, self._named)):
            return
        # Another request may have published the same tokens first, and own them now.
        length = self.fixed.shape[2]
        self.shared = torch.stack([_widened(slots[None], length, PADDING)[0] for slots in named])
        self.rows = host.rows[self.shared].to(torch.int64).clamp(min=0)
        self._named = named


class Recall:
    """Recall on one rank.

    Args:
        arena: whose cells attention reads.
        host: where all tokens of a prompt lie.

    Attributes:
        codes: `[planes, rows, heads_per_cell, bytes]` uint8 on the arena's device: the sketch of each token in host
            memory, by its row there.
    """

    def __init__(self, arena: Arena, host: HostPool) -> None:
        self._arena = arena
        self._host = host
        self._sketch = KeySketch(arena.head_dim, arena.device)
        shape = (arena.counted_planes, host.num_tokens, arena.heads_per_cell, self._sketch.bytes)
        self.codes = torch.zeros(shape, dtype=torch.uint8, device=arena.device)
        self._recalled, self._fetched = torch.zeros(2, dtype=torch.int64, device=arena.device)
        self._batch: AreaBatch | None = None

    @property
    def recalled(self) -> int:
        """Tokens that decode steps have read from areas so far, in all planes; waits for the device."""
        return int(self._recalled)

    @property
    def fetched(self) -> int:
        """Those of them that had to be copied from host memory; waits for the device."""
        return int(self._fetched)

    def compile_kernels(self, num_heads: int) -> None:
        """Launch what a decode step of a model with so many query heads on this rank launches, to no effect."""
        heads = num_heads // self._arena.groups
        queries = torch.zeros(1, heads, self._arena.head_dim, device=self._arena.device)
        self._sketch.batch_scores(queries, self.codes[0], torch.zeros(1, 1, dtype=torch.int64, device=queries.device))

    # -- the prefill ------------------------------------------------------------------------------------------------

    def sketch(self, slots: torch.Tensor, cells: torch.Tensor) -> None:
        """Sketch the keys of tokens that have just been written to host memory.

        Args:
            slots: `[tokens]` int64.
            cells: `[planes, tokens]` int, where they are in the arena.
        """
        rows, groups = self._host.rows[slots].to(torch.int64), self._arena.groups
        for layer_id in self._arena.layer_ids:
            layer = self._arena.layer(layer_id)
            keys = self._arena.read(layer, cells[layer.planes].to(torch.int64), torch.float32)[:, 0]
            codes = self._sketch.encode(keys).unflatten(1, (groups, -1))  # [tokens, G, K/G, bytes]
            self.codes[layer.planes, rows] = codes.transpose(0, 1)

    def candidates(self, slots: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """`[planes, length]` bool: tokens that are not kept and can be brought back.

        Args:
            slots: `[length]` int64, of the prompt, as in `OwnSlots.shared`.
            keep: `[planes, length]` bool.
        """
        found = ~keep & self._host.has(slots)
        found[self._arena.counted_planes :] = False  # what has left a window is not seen any more
        return found

    @staticmethod
    def places(candidates: torch.Tensor, tokens: int) -> torch.Tensor:
        """`[planes, length]` bool: in each plane the first `tokens` candidates, under whose slots the area lies."""
        return candidates & (candidates.cumsum(1) <= tokens)

    def begin(self, own: OwnSlots, candidates: torch.Tensor, places: torch.Tensor, tokens: int) -> RecallArea:
        """The area of a request whose private slots have cells where `places` says; it holds the tokens of its places.

        Args:
            candidates, places: `[planes, length]` bool.
            tokens: which `places` has at most in a plane.
        """
        order = torch.argsort(places.to(torch.int8), dim=1, descending=True, stable=True)[:, :tokens]
        there = places.gather(1, order)
        cells = self._arena.residency.table[:, own.private].gather(1, order).to(torch.int64)
        return RecallArea(
            own,
            ~candidates,
            torch.where(there, order, EMPTY),
            torch.where(there, cells, -1),
            torch.zeros((), dtype=torch.int64, device=order.device),
        )

    # -- decode -----------------------------------------------------------------------------------------------------

    def step(self, areas: Sequence[RecallArea]) -> None:
        """A decode step of the requests of `areas`, at least one, begins.  Does not wait for the device."""
        if (
            self._batch is None
            or len(areas) != len(self._batch.areas)
            or not all(map(operator.is_, areas, self._batch.areas))
        ):
            self._batch = AreaBatch(areas)
        self._batch.step(self._host)
        self._recalled += self._batch.held.sum()

    def refresh(self, planes: slice, queries: torch.Tensor, scale: float) -> None:
        """Bring what one layer needs in this step, for all requests.  Does not wait for the device.

        Args:
            planes: the layer's.
            queries: `[B, H, D]` of the step's tokens, in the order of the areas.
            scale: of attention.
        """
        batch, groups = self._batch, planes.stop - planes.start
        assert batch is not None
        by_group = queries.unflatten(1, (groups, -1)).unbind(1)
        for plane, own in enumerate(by_group, planes.start):
            logits = self._sketch.batch_scores(own, self.codes[plane], batch.rows).mul_(scale)
            # Attention among the evicted by their sketches, summed over query heads.
            fixed = batch.fixed[plane]
            needs = logits.masked_fill_(fixed[:, None], -torch.inf).softmax(-1).sum(1).masked_fill_(fixed, -1.0)
            self._bring(batch, plane, needs.topk(batch.positions.shape[2]).indices)

    def _bring(self, batch: AreaBatch, plane: int, wanted: torch.Tensor) -> None:
        """Let the areas of a plane hold the tokens at `wanted` `[B, tokens]`, those needed most first."""
        held, positions = batch.held[plane], batch.positions[plane]
        length = batch.fixed.shape[2]
        # An area that is smaller than others holds as many of the first; behind the end stands what nobody has.
        wanted = torch.where(
            torch.arange(wanted.shape[1], device=held.device) < held.sum(1, keepdim=True), wanted, length
        )
        there = positions.new_zeros((len(positions), length + 1), dtype=torch.bool)
        missing = ~there.scatter(1, torch.where(held, positions, length), True).gather(1, wanted) & (wanted < length)
        spare = ~there.scatter(1, wanted, True).gather(1, positions.clamp(min=0)) & held
        # As many are missing as are spare: the first of those takes the place of the first of these, and so on.
        first_missing, first_spare = (
            torch.argsort(which.to(torch.int8), dim=1, descending=True, stable=True) for which in (missing, spare)
        )
        changes = missing.gather(1, first_missing)
        new = torch.where(changes, wanted.gather(1, first_missing), 0)
        positions.scatter_(1, first_spare, torch.where(changes, new, positions.gather(1, first_spare)))
        to = torch.where(changes, batch.cells[plane].gather(1, first_spare), -1)
        count = changes.sum(1)
        batch.fetched += count
        total = count.sum()
        self._fetched += total
        here = slice(plane, plane + 1)
        self._host.copy(here, batch.shared.gather(1, new).flatten(), self._arena.raw[None], to.flatten()[None], total)


def _widened(rows: torch.Tensor, width: int, filler: int) -> torch.Tensor:
    """`[planes, m]` with `filler` behind, `[planes, width]`."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=filler)
