"""The one memory that all layers share: cells, and which of them holds a token in a layer."""

from __future__ import annotations

import torch

from vlcache_sgl.memory.residency import Residency


def merge_groups(cells: torch.Tensor) -> torch.Tensor:
    """One layer's cells by head group, `[G, tokens, 2, K/G, D]`, -> by token with all heads, `[tokens, 2, K, D]`."""
    groups, tokens, two, heads, dim = cells.shape
    return cells.permute(1, 2, 0, 3, 4).reshape(tokens, two, groups * heads, dim)


class Arena:
    """``cells[cell] = (K, V)`` for all layers; `residency` says which cell holds a token in a layer.

    Args:
        num_cells: cells, the padding cell 0 not counted.
        num_slots: virtual slots, the padding slot 0 not counted.
        num_layers: layers of this rank.
        kv_heads: KV heads of this rank.
        groups: cells per (layer, token): 1, or the number of KV heads.
        dtype: of keys and values.
        first_layer: number of the model's layer that is this rank's first.

    Attributes:
        cells: `[num_cells + 1, 2, heads_per_cell, head_dim]`, K at index 0 and V at 1; cell 0 is padding.
    """

    def __init__(
        self,
        *,
        num_cells: int,
        num_slots: int,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        groups: int,
        dtype: torch.dtype,
        device: torch.device | str,
        first_layer: int = 0,
    ) -> None:
        if kv_heads % groups:
            raise ValueError(f"{kv_heads} KV heads cannot be divided into {groups} groups")
        self.groups = groups
        self.heads_per_cell = kv_heads // groups
        self.head_dim = head_dim
        self.num_planes = num_layers * groups
        self.first_layer = first_layer
        # Zeros, not empty: the padding cell is read (and masked) where batches are ragged, and 0 * NaN is NaN.
        self.cells = torch.zeros((num_cells + 1, 2, self.heads_per_cell, head_dim), dtype=dtype, device=device)
        self.residency = Residency(self.num_planes, num_slots, num_cells, device)

    @property
    def device(self) -> torch.device:
        return self.cells.device

    @property
    def nbytes(self) -> int:
        """Bytes of all cells, the padding cell included."""
        return self.cells.nbytes

    @property
    def cell_bytes(self) -> int:
        """Bytes of one cell: K and V of one token in one plane."""
        return int(self.cells[0].numel() * self.cells.element_size())

    def planes_of(self, layer_id: int) -> slice:
        """The planes of a layer of the model, as a slice of `residency.table`."""
        first = (layer_id - self.first_layer) * self.groups
        return slice(first, first + self.groups)

    def write(self, cells: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store `k` and `v` `[tokens, kv_heads, head_dim]` in `cells` `[groups, tokens]` of one layer."""
        tokens = k.shape[0]
        shape = (tokens, self.groups, self.heads_per_cell, self.head_dim)
        self.cells[:, 0][cells] = k.view(shape).transpose(0, 1).to(self.cells.dtype)
        self.cells[:, 1][cells] = v.view(shape).transpose(0, 1).to(self.cells.dtype)

    def write_cells(self, slots: torch.Tensor) -> torch.Tensor:
        """Cells `[planes, tokens]` int64 to write `slots` to; slots freed meanwhile write to the padding cell.

        Under overlap scheduling the last step of a request that has ended is still in flight when its slots go.
        """
        return self.residency.table[:, slots].clamp(min=0).to(torch.int64)
