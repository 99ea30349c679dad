"""The one memory that all layers share: cells, and which of them holds a token in a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlcache_sgl.memory.residency import Residency


class Arena:
    """``cells[cell] = (K, V)`` for all layers; `residency` says which cell holds a token in a layer.

    Args:
        num_cells: cells, the padding cell 0 not counted.
        num_slots: virtual slots, the padding slot 0 not counted.
        num_layers: layers that keep their tokens here, on this rank.
        kv_heads: KV heads of this rank.
        groups: cells per (layer, token): 1, or the number of KV heads.
        dtype: of keys and values.
        layer_ids: which layers of the model they are, in order; None: 0, 1, ...

    Attributes:
        layer_ids: the layers of the model whose tokens are here, in the order of their planes.
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
        layer_ids: Sequence[int] | None = None,
    ) -> None:
        if kv_heads % groups:
            raise ValueError(f"{kv_heads} KV heads cannot be divided into {groups} groups")
        self.groups = groups
        self.heads_per_cell = kv_heads // groups
        self.head_dim = head_dim
        self.num_planes = num_layers * groups
        self.layer_ids = tuple(range(num_layers) if layer_ids is None else layer_ids)
        self._numbers = {layer: number for number, layer in enumerate(self.layer_ids)}
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

    def number_of(self, layer_id: int) -> int:
        """Which of the layers here a layer of the model is: what policies, budgets and reports count by."""
        return self._numbers[layer_id]

    def planes_at(self, number: int) -> slice:
        """The planes of one of the layers here, as a slice of `residency.table`."""
        return slice(number * self.groups, (number + 1) * self.groups)

    def planes_of(self, layer_id: int) -> slice:
        """The planes of a layer of the model."""
        return self.planes_at(self.number_of(layer_id))

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
