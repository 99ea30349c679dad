"""What one forward reads and writes: the memory, and the requests of a prefill or decode batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlcache_sgl.memory.layers import LayerCells, Window
from vlcache_sgl.memory.residency import Residency
from vlcache_sgl.memory.scales import UNSCALED, Scales


@dataclass(frozen=True)
class Memory:
    """Where keys and values are, and who holds them."""

    arena: torch.Tensor
    """`[cells + 1, 2, heads_per_cell, head_dim]`, K at index 0 and V at 1; cell 0 is padding and zero."""
    residency: Residency
    req_to_token: torch.Tensor
    """`[rows, context]` int32, the slot of each position of a request; row 0 is padding and zero."""
    groups: int
    """Cells per (layer, token): 1, or the number of KV heads."""
    scales: Sequence[Scales] = ()
    """Of each counted layer, then of those with a window; none: 1."""
    window: Window | None = None
    """The layers beside the counted ones."""

    @property
    def counted_planes(self) -> range:
        """Of the counted layers: the first ones of `residency`."""
        return range(self.residency.num_planes - (0 if self.window is None else self.window.planes))

    @property
    def window_planes(self) -> range:
        """Of the layers with a window: those behind."""
        return range(self.counted_planes.stop, self.residency.num_planes)

    @property
    def num_layers(self) -> int:
        """Counted layers."""
        return len(self.counted_planes) // self.groups

    def layer_of(self, planes: slice) -> int:
        """The counted layer (from 0 on this rank) whose planes these are."""
        return int(planes.start) // self.groups

    def scales_of(self, planes: slice) -> Scales:
        """What stored keys and values of a layer are multiplied by."""
        return self.scales[self.layer_of(planes)] if self.scales else UNSCALED

    def scales_in_window(self, layer: LayerCells) -> Scales:
        """The same of a layer with a window."""
        return self.scales[layer.place] if self.scales else UNSCALED


@dataclass(frozen=True)
class ExtendRequest:
    """One request of a prefill batch."""

    row: int
    """Its row of `req_to_token`."""
    tokens: slice
    """Its rows in the batch."""
    begin: int
    """Position of its first new token."""
    observed: bool = False
    """Whether `observe` is to be called for it."""

    @property
    def count(self) -> int:
        """New tokens."""
        return int(self.tokens.stop - self.tokens.start)


@dataclass(frozen=True)
class ExtendBatch:
    """New tokens of several requests, each seeing the kept part of what precedes it, and itself causally."""

    requests: tuple[ExtendRequest, ...]
    rows: torch.Tensor
    """`[B]` int64 on the device, as in `requests`."""
    prefix_lens: torch.Tensor
    """`[B]` int on the device, positions before the new tokens, evicted ones included."""
    seq_lens: torch.Tensor
    """`[B]` int on the device, the same with the new tokens."""
    want_lse: bool = False


@dataclass(frozen=True)
class DecodeBatch:
    """One new token per request.

    The host's lists name the real requests; the tensors may have `padding` more rows, which are request row 0 with
    length 1: the padding cell.
    """

    rows: list[int]
    lengths: list[int]
    """Including the token of this step."""
    row_tensor: torch.Tensor
    """`[B]` int64 on the device."""
    length_tensor: torch.Tensor
    """`[B]` int on the device."""
    new_cells: torch.Tensor
    """`[planes, B]` int32, where this step writes; -1 for padding rows."""
    padding: int = 0
    recorded: bool = False
    """A CUDA graph is about to be captured or replayed: everything that kernels read is to lie where it lay."""
