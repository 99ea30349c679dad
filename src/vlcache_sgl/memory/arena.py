"""The one memory that all layers share: cells, and which of them holds a token in a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlcache_sgl.memory.layers import LayerCells, Window, lay_out
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
        num_layers: counted layers of this rank, see `memory/layers.py`.
        kv_heads: KV heads of this rank in these layers.
        groups: cells per (layer, token): 1, or the number of KV heads.
        dtype: of stored keys and values; 8-bit floats are stored divided by the layer's scales.
        layer_ids: which layers of the model they are, in order; None: 0, 1, ...
        window: layers that attend to the last tokens only.

    Attributes:
        layer_ids: the counted layers, in the order of their planes.
        cells: `[num_cells + 1, 2, heads_per_cell, head_dim]`, K at index 0 and V at 1; cell 0 is padding.
        raw: the same memory for whoever moves cells without reading them, see `as_bytes`.
        scales: of the counted layers, then of those with a window; 1 unless the model brings others.
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
        window: Window | None = None,
    ) -> None:
        if kv_heads % groups:
            raise ValueError(f"{kv_heads} KV heads cannot be divided into {groups} groups")
        self.groups = groups
        self.heads_per_cell = kv_heads // groups
        self.head_dim = head_dim
        self.counted_planes = num_layers * groups
        self.num_planes = self.counted_planes + (0 if window is None else window.planes)
        self.layer_ids = tuple(range(num_layers) if layer_ids is None else layer_ids)
        self.window = window
        self._layers = lay_out(self.layer_ids, groups, self.heads_per_cell, head_dim, window)
        # Zeros, not empty: the padding cell is read (and masked) where batches are ragged, and 0 * NaN is NaN.
        self.cells = torch.zeros((num_cells + 1, 2, self.heads_per_cell, head_dim), dtype=dtype, device=device)
        self.raw = as_bytes(self.cells)
        self.scales = [UNSCALED] * len(self._layers)
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

    @property
    def planes_of_layers(self) -> tuple[slice, ...]:
        """The planes of each layer, those of layers that share cells once."""
        found = {where.planes.start: where.planes for where in self._layers.values()}
        return tuple(found.values())

    @property
    def planes_per_layer(self) -> int:
        """The most planes that a layer has."""
        return max(self.groups, 0 if self.window is None else self.window.planes_per_layer)

    def layer(self, layer_id: int) -> LayerCells:
        """Where a layer of the model keeps its tokens."""
        return self._layers[layer_id]

    def number_of(self, layer_id: int) -> int:
        """Which of the counted layers a layer of the model is: what policies, budgets and reports count by."""
        return self._layers[layer_id].number

    def planes_of(self, layer_id: int) -> slice:
        """The planes of a layer of the model, as a slice of `residency.table`."""
        return self._layers[layer_id].planes

    def scales_of(self, layer: LayerCells) -> Scales:
        """What the stored keys and values of a layer are multiplied by."""
        return self.scales[layer.place]

    def set_scales(self, layer: LayerCells, scales: Scales) -> None:
        """Let keys and values of a layer be stored with scales; cells of wider types need none."""
        if self.cells.dtype in FP8:
            self.scales[layer.place] = scales

    def write(self, cells: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerCells | None = None) -> None:
        """Store `k` and `v` `[tokens, kv_heads, head_dim]` in `cells` `[planes, tokens]` of a layer.

        Args:
            layer: whose; None: any that is counted and has no scales.
        """
        memory = self.raw if layer is None else layer.view(self.raw)
        scales = UNSCALED if layer is None else self.scales_of(layer)
        shape = (k.shape[0], cells.shape[0], *memory.shape[2:])
        for half, numbers, scale in ((0, k, scales.key), (1, v, scales.value)):
            stored = (numbers if scale == 1.0 else numbers / scale).to(self.cells.dtype)
            memory[:, half][cells] = as_bytes(stored).view(shape).transpose(0, 1)

    def read(self, layer: LayerCells, cells: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[tokens, 2, kv_heads, head_dim]` from `cells` `[planes, tokens]` of a layer, as numbers."""
        return self.join(layer, layer.view(self.raw)[cells], dtype)

    def join(self, layer: LayerCells, both: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What was moved as `raw`, `[planes, tokens, 2, heads, head_dim]` of a layer, as numbers by token.

        Returns:
            `[tokens, 2, kv_heads, head_dim]`.
        """
        by_token = merge_groups(both.view(self.cells.dtype))
        return self.scales_of(layer).load(by_token, dtype)

    def write_cells(self, slots: torch.Tensor) -> torch.Tensor:
        """Cells `[planes, tokens]` int64 to write `slots` to; slots freed meanwhile write to the padding cell.

        Under overlap scheduling the last step of a request that has ended is still in flight when its slots go.
        """
        return self.residency.table[:, slots].clamp(min=0).to(torch.int64)
