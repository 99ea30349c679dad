"""How FlashInfer lays a schedule out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PLAN_NUMBERS = 15
"""Numbers that FlashInfer 0.7's planner returns for its FA2 prefill kernel, in the order of `ScheduleLayout.of`."""


@dataclass(frozen=True)
class ScheduleLayout:
    """Where the parts of a schedule lie, in bytes from its beginning, and what sizes it.

    All parts are int32 but `mask`, one byte per block.  With `Q` sequences, `R` query rows and `blocks` blocks:
    """

    blocks: int
    """Blocks that are launched per KV head; those that have nothing to do are masked."""
    rows: int
    """`R`, query rows of all sequences."""
    tile: int
    """Packed query rows (query heads of a KV head times rows) of one block."""
    group: int
    """Query heads per KV head."""
    limit: int
    """Blocks per KV head that keys are cut for: as many as run at the same time."""
    total_rows: int
    """`[1]`: `R`."""
    request: int
    """`[blocks]`: which sequence."""
    qo_tile: int
    """`[blocks]`: which tile of its rows."""
    kv_tile: int
    """`[blocks]`: which chunk of its keys."""
    merge: int
    """`[R + 1]`: partial outputs of the rows before each row."""
    outputs: int
    """`[Q + 1]`: the same by sequence."""
    chunk: int
    """`[1]`: keys per chunk."""
    mask: int
    """`[blocks]`: whether there is something to do."""

    @property
    def nbytes(self) -> int:
        """Bytes of a schedule."""
        return max(self.mask + self.blocks, self.merge + 4 * (self.rows + 1))

    @classmethod
    def of(cls, plan: Sequence[int], group: int, limit: int) -> ScheduleLayout:
        """From what FlashInfer's planner returns for a plan that CUDA graphs may replay.

        Raises:
            ValueError: `plan` is not such a plan of a version that we know.
        """
        if len(plan) != PLAN_NUMBERS or not (plan[13] and plan[14]):
            raise ValueError(f"not a plan of FlashInfer 0.7 for CUDA graphs, with keys cut into chunks: {list(plan)}")
        return cls(
            blocks=plan[0],
            rows=plan[1],
            total_rows=plan[2],
            tile=plan[3],
            request=plan[4],
            qo_tile=plan[5],
            kv_tile=plan[6],
            merge=plan[7],
            outputs=plan[8],
            chunk=plan[9],
            mask=plan[12],
            group=group,
            limit=limit,
        )
