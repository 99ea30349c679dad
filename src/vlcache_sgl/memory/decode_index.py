"""Which cells each running request attends to, kept up to date from step to step.

Looking the residency table up anew for every step would cost time for evicted tokens too.  Here a request's cells
are collected once, when its row has changed, and then only appended to: a step costs what is *kept*.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlcache_sgl.memory.residency import PADDING, Residency

SLACK = 64
"""Free columns added whenever an index is laid out, so that most steps only append."""


@dataclass(frozen=True)
class RowCells:
    """Cells of one request, all planes."""

    cells: torch.Tensor
    """`[planes, width]` int32, kept cells in sequence order, then padding cells."""
    counts: torch.Tensor
    """`[planes]` int64, how many are kept."""
    length: int
    """Tokens of the sequence that are accounted for, evicted ones included."""


def collect(residency: Residency, slots: torch.Tensor) -> RowCells:
    """Kept cells of the sequence `slots` `[tokens]`, in order."""
    cells = residency.table[:, slots]
    kept = cells >= 0
    counts = kept.sum(1)
    width = int(counts.max()) if slots.numel() else 0
    packed = cells.new_full((residency.num_planes, width), PADDING)
    filled = torch.arange(width, device=cells.device)[None] < counts[:, None]
    # Both masks enumerate row by row, so sequence order survives.
    packed[filled] = cells[kept]
    return RowCells(packed, counts, slots.numel())


class DecodeIndex:
    """The cells of the running batch.

    Attributes:
        cells: `[planes, batch, width]` int32, kept cells then padding.
        counts: `[planes, batch]` int64, valid columns.
        widest: per plane, the largest count of the batch, on the host.
        groups: request numbers in groups of similar length: what is padded together.
    """

    def __init__(self, residency: Residency, req_to_token: torch.Tensor) -> None:
        self._residency = residency
        self._req_to_token = req_to_token
        self._rows: list[int] = []
        self._lengths: list[int] = []
        self._stale: set[int] = set()
        self.cells = torch.empty((residency.num_planes, 0, 0), dtype=torch.int32, device=residency.device)
        self.counts = torch.empty((residency.num_planes, 0), dtype=torch.int64, device=residency.device)
        self.widest: list[int] = []
        self.groups: list[torch.Tensor] = []

    def invalidate(self, row: int) -> None:
        """The slots of request row `row` have changed: collect them anew."""
        self._stale.add(row)

    def step(self, rows: list[int], lengths: list[int], new_cells: torch.Tensor) -> None:
        """Prepare one decode step.

        Args:
            rows: request rows of the batch, in order.
            lengths: sequence lengths including the token of this step.
            new_cells: `[planes, batch]` int, where this step writes.
        """
        continued = rows == self._rows and not self._stale.intersection(rows)
        continued = continued and all(new == old + 1 for new, old in zip(lengths, self._lengths, strict=True))
        if not continued or max(self.widest, default=0) + 1 > self.cells.shape[2]:
            self._lay_out(rows, lengths)
        self.cells.scatter_(2, self.counts.unsqueeze(-1), new_cells.unsqueeze(-1).to(torch.int32))
        self.counts += 1
        self.widest = [width + 1 for width in self.widest]
        self._lengths = list(lengths)

    def _lay_out(self, rows: list[int], lengths: list[int]) -> None:
        known = {row: number for number, row in enumerate(self._rows) if row not in self._stale}
        parts = []
        for row, length in zip(rows, lengths, strict=True):
            number = known.get(row)
            if number is not None and self._lengths[number] == length - 1:
                parts.append(RowCells(self.cells[:, number], self.counts[:, number], length - 1))
            else:
                slots = self._req_to_token[row, : length - 1].to(torch.int64)
                parts.append(collect(self._residency, slots))
        counts = torch.stack([part.counts for part in parts], dim=1)
        host = counts.cpu()
        width = int(host.max()) + SLACK
        cells = self.cells.new_full((self._residency.num_planes, len(parts), width), PADDING)
        for number, part in enumerate(parts):
            used = int(host[:, number].max())
            cells[:, number, :used] = part.cells[:, :used]
        self.cells, self.counts = cells, counts
        self.widest = host.amax(1).tolist()
        self.groups = _similar(host.sum(0), cells.device)
        self._rows, self._lengths = list(rows), [length - 1 for length in lengths]
        self._stale.difference_update(rows)


def _similar(totals: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    """Request numbers grouped so that nobody is padded to much more than its own length; longest first."""
    order = torch.argsort(totals, descending=True, stable=True).tolist()
    groups: list[list[int]] = []
    longest = 0
    for number in order:
        total = int(totals[number])
        if not groups or total < 0.75 * longest:
            groups.append([])
            longest = total
        groups[-1].append(number)
    return [torch.tensor(group, device=device) for group in groups]
