"""The one memory that all layers share: cells, and which of them holds a token in a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlcache_sgl.memory.residency import Residency
from vlcache_sgl.memory.scales import FP8, UNSCALED, Scales, as_bytes


def merge_groups(cells: torch.Tensor) -> torch.Tensor:
    """One layer's cells by head group, `[G, tokens, 2, K/G, D]`, -> by token with all heads, `[tokens, 2, K, D]`."""
    groups, tokens, two, heads, dim = cells.shape
    return cells.permute(1, 2, 0, 3, 4).reshape(tokens, two, groups * heads, dim)


class Arena:
    """``cells[cell] = (K, V)`` for all layers; `residency` says which cell holds a token in a layer.

    Args:
        num_cells: cells, the padding cell 0 not counted.
        num_slots: virtual slots, the padding slot 0 not counted.
        num_layers: layers that keep their tokens here, on this rank.
        kv_heads: KV heads of this rank.
        groups: cells per (layer, token): 1, or the number of KV heads.
        dtype: of stored keys and values; 8-bit floats are stored divided by the layer's scales.
        layer_ids: which layers of the model they are, in order; None: 0, 1, ...

    Attributes:
        layer_ids: the layers of the model whose tokens are here, in the order of their planes.
        cells: `[num_cells + 1, 2, heads_per_cell, head_dim]`, K at index 0 and V at 1; cell 0 is padding.
        raw: the same memory for whoever moves cells without reading them, see `as_bytes`.
        scales: of each layer; 1 unless the model brings others.
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
        self.raw = as_bytes(self.cells)
        self.scales = [UNSCALED] * num_layers
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

    @property
    def wide_dtype(self) -> torch.dtype:
        """In which keys and values are shown to policies: that of the cells, or one that holds 8-bit floats exactly."""
        return torch.bfloat16 if self.cells.dtype in FP8 else self.cells.dtype

    def number_of(self, layer_id: int) -> int:
        """Which of the layers here a layer of the model is: what policies, budgets and reports count by."""
        return self._numbers[layer_id]

    def planes_at(self, number: int) -> slice:
        """The planes of one of the layers here, as a slice of `residency.table`."""
        return slice(number * self.groups, (number + 1) * self.groups)

    def planes_of(self, layer_id: int) -> slice:
        """The planes of a layer of the model."""
        return self.planes_at(self.number_of(layer_id))

    def scales_of(self, planes: slice) -> Scales:
        """What the stored keys and values of a layer, whose planes these are, are multiplied by."""
        return self.scales[planes.start // self.groups]

    def set_scales(self, planes: slice, scales: Scales) -> None:
        """Let keys and values of a layer be stored with scales; cells of wider types need none."""
        if self.cells.dtype in FP8:
            self.scales[planes.start // self.groups] = scales

    def write(self, cells: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: Scales = UNSCALED) -> None:
        """Store `k` and `v` `[tokens, kv_heads, head_dim]` in `cells` `[groups, tokens]` of a layer with `scales`."""
        shape = (k.shape[0], self.groups, self.heads_per_cell, self.head_dim)
        for half, numbers, scale in ((0, k, scales.key), (1, v, scales.value)):
            stored = (numbers if scale == 1.0 else numbers / scale).to(self.cells.dtype)
            self.raw[:, half][cells] = as_bytes(stored).view(shape).transpose(0, 1)

    def read(self, planes: slice, cells: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[tokens, 2, kv_heads, head_dim]` from `cells` `[groups, tokens]` of the layer of `planes`, as numbers."""
        return self.join(planes, self.raw[cells], dtype)

    def join(self, planes: slice, both: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What was moved as `raw`, `[groups, tokens, 2, heads_per_cell, head_dim]`, as numbers by token.

        Returns:
            `[tokens, 2, kv_heads, head_dim]`.
        """
        by_token = both.view(self.cells.dtype).permute(1, 2, 0, 3, 4).flatten(2, 3)
        return self.scales_of(planes).load(by_token, dtype)

    def write_cells(self, slots: torch.Tensor) -> torch.Tensor:
        """Cells `[planes, tokens]` int64 to write `slots` to; slots freed meanwhile write to the padding cell.

        Under overlap scheduling the last step of a request that has ended is still in flight when its slots go.
        """
        return self.residency.table[:, slots].clamp(min=0).to(torch.int64)
