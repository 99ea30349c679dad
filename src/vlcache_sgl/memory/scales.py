"""Between keys and values as a model computes them, and as cells hold them.

Cells of 8-bit floats hold a number divided by a scale of its layer; whoever reads a cell multiplies by it again.  Cells
of wider types hold what was computed, rounded at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Types of cells that have scales."""


@dataclass(frozen=True)
class Scales:
    """What a layer's stored keys and values are multiplied by when they are read."""

    key: float = 1.0
    value: float = 1.0

    def load(self, both: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Keys and values of cells as numbers of a model.

        Args:
            both: `[..., 2, heads, head_dim]`, K at index 0 and V at 1, as cells hold them.
            dtype: of the result, one that is not 8 bits wide.

        Returns:
            The same shape; `both` itself where nothing is to be done.
        """
        numbers = both.to(dtype)
        if self == UNSCALED:
            return numbers
        factors = torch.tensor([self.key, self.value], dtype=dtype, device=both.device)
        return numbers * factors.view(2, 1, 1)


UNSCALED = Scales()


def as_bytes(cells: torch.Tensor) -> torch.Tensor:
    """The same memory as a type that can be indexed everywhere: bytes instead of 8-bit floats."""
    return cells.view(torch.uint8) if cells.dtype in FP8 else cells
