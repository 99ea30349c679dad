"""Attention over cells with plain torch: the reference, and the path for machines without a GPU."""

from __future__ import annotations

import torch

from vlcache_sgl.attention import window
from vlcache_sgl.attention.base import Observe
from vlcache_sgl.attention.gather import Gather, attend
from vlcache_sgl.memory.arena import merge_groups
from vlcache_sgl.memory.batches import DecodeBatch, ExtendBatch, Memory
from vlcache_sgl.memory.decode_index import DecodeIndex, RowCells, collect
from vlcache_sgl.memory.layers import LayerCells
from vlcache_sgl.memory.scales import UNSCALED, Scales

GATHER_BYTES = 8 << 20
"""Keys and values gathered before they are attended to: about a processor's last-level cache, so that attention
reads them from there and not a second time from memory."""


class TorchProvider:
    """Plain torch, on any device; no CUDA graphs, and the host reads sizes from the device."""

    on_device = False
    lists = None

    def __init__(self, memory: Memory, dtype: torch.dtype) -> None:
        self._memory = memory
        self._dtype = dtype
        self._gather = Gather(memory.arena, dtype)
        self._gathers: dict[tuple[int, int, int], Gather] = {}
        self._batch: ExtendBatch | None = None
        self._prefixes: list[RowCells | None] = []
        self.index = DecodeIndex(memory.residency, memory.req_to_token)

    def invalidate(self, row: int) -> None:
        self.index.invalidate(row)

    def plan_extend(self, batch: ExtendBatch) -> None:
        self._batch = batch
        self._prefixes = [kept_prefix(self._memory, request.row, request.begin) for request in batch.requests]
        for request in batch.requests:
            self.index.invalidate(request.row)

    def extend(
        self,
        planes: slice,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        observe: Observe,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self._batch is not None
        output = torch.empty_like(queries)
        lse = queries.new_empty(queries.shape[:2], dtype=torch.float32) if self._batch.want_lse else None
        for number, (request, cells) in enumerate(zip(self._batch.requests, self._prefixes, strict=True)):
            part = request.tokens
            prefix = valid = None
            if cells is not None:
                prefix, valid = prefix_keys_values(self._gather, cells, planes, self._memory.scales_of(planes))
            arguments = (queries[part], keys[part], values[part], prefix, valid, scale)
            if lse is not None:
                output[part], lse[part] = extend_with_lse(*arguments)
            else:
                output[part] = extend(*arguments)
            if request.observed:
                observe(number, prefix, valid)
        return output, lse

    def plan_decode(self, batch: DecodeBatch) -> None:
        self.index.step(batch.rows, batch.lengths, batch.new_cells)

    def decode(self, planes: slice, queries: torch.Tensor, scale: float) -> torch.Tensor:
        return decode(queries, self.index, planes, self._gather, scale, self._memory.scales_of(planes))

    def extend_in_window(
        self, layer: LayerCells, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        assert self._batch is not None
        assert layer.window is not None
        gather, scales = self._gather_of(layer), self._memory.scales_in_window(layer)
        output = torch.empty_like(queries)
        for request, cells in zip(self._batch.requests, self._prefixes, strict=True):
            part = request.tokens
            prefix = None if cells is None else window.last_of_prefix(gather, cells, layer, scales)
            output[part] = window.extend(queries[part], keys[part], values[part], prefix, layer.window, scale)
        return output

    def decode_in_window(self, layer: LayerCells, queries: torch.Tensor, scale: float) -> torch.Tensor:
        return window.decode(
            queries, self.index, layer, self._gather_of(layer), scale, self._memory.scales_in_window(layer)
        )

    def _gather_of(self, layer: LayerCells) -> Gather:
        """For a layer that divides cells its own way."""
        kind = (layer.part, layer.heads, layer.head_dim)
        if kind not in self._gathers:
            self._gathers[kind] = Gather(layer.view(self._memory.arena), self._dtype)
        return self._gathers[kind]

    def init_graphs(self, max_batch: int) -> None:
        raise NotImplementedError("attention in plain torch cannot be recorded in a CUDA graph")

    def fits_graph(self, rows: list[int], lengths: list[int]) -> bool:
        return False


def kept_prefix(memory: Memory, row: int, length: int) -> RowCells | None:
    """Kept cells of the first `length` positions of a request row, all planes; None when there are no positions."""
    if not length:
        return None
    return collect(memory.residency, memory.req_to_token[row, :length].to(torch.int64))


def prefix_keys_values(
    gather: Gather, prefix: RowCells, planes: slice, scales: Scales = UNSCALED
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What one layer keeps of a request's earlier tokens.

    Returns:
        `[P, 2, K, D]` in sequence order (a copy), and `[K]` valid counts where KV heads keep different numbers of
        tokens (None: all `P` are valid).
    """
    counts = prefix.counts[planes]
    width = int(counts.max())
    both = gather(prefix.cells[planes, :width], scales)
    merged = merge_groups(both)
    if len(both) == 1:
        merged = merged.clone()
    ragged = int(counts.min()) != width
    return merged, counts.repeat_interleave(both.shape[3]) if ragged else None


def extend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: torch.Tensor | None,
    prefix_valid: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Causal attention of new tokens over the kept prefix and themselves.

    Args:
        queries: `[t, H, D]`.
        keys, values: `[t, K, D]`, the new tokens' own.
        prefix: `[P, 2, K, D]` or None.
        prefix_valid: `[K]`, leading prefix entries that exist per KV head; None = all.
        scale: factor of the logits.

    Returns:
        `[t, H, D]`.
    """
    return extend_with_lse(queries, keys, values, prefix, prefix_valid, scale)[0]


def extend_with_lse(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: torch.Tensor | None,
    prefix_valid: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`extend`, and `[t, H]` float32, the natural logarithm of the sum of exponentials of everything visible."""
    tokens, num_heads, dim = queries.shape
    kv_heads = keys.shape[1]
    group = num_heads // kv_heads
    # KV heads as the batch and their query heads as the heads: keys are then shared by stride, not by copy.
    q = queries.view(tokens, kv_heads, group, dim).permute(1, 2, 0, 3)
    own, own_lse = _flash(q, _shared(keys, group), _shared(values, group), scale, causal=True)
    if prefix is None or prefix.shape[0] == 0:
        return own.permute(2, 0, 1, 3).reshape(tokens, num_heads, dim), _by_token(own_lse)
    mask = None
    if prefix_valid is not None:
        seen = torch.arange(prefix.shape[0], device=q.device)[None] < prefix_valid[:, None]
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
        mask = mask[:, None, None, :].expand(-1, group, tokens, -1)
    old, old_lse = _flash(q, _shared(prefix[:, 0], group), _shared(prefix[:, 1], group), scale, causal=False, mask=mask)
    if prefix_valid is not None:
        # Kernels disagree about rows that see nothing: torch's on a CPU says that their sum of exponentials is 1.
        empty = (prefix_valid == 0)[:, None, None]
        old, old_lse = old.masked_fill(empty.unsqueeze(-1), 0.0), old_lse.masked_fill(empty, -torch.inf)
    weight = torch.sigmoid(old_lse - own_lse).unsqueeze(-1)
    merged = torch.lerp(own.float(), old.float(), weight).to(queries.dtype)
    return merged.permute(2, 0, 1, 3).reshape(tokens, num_heads, dim), _by_token(torch.logaddexp(own_lse, old_lse))


def _by_token(lse: torch.Tensor) -> torch.Tensor:
    """`[K, group, t]` -> `[t, K * group]`."""
    return lse.flatten(0, 1).T


def _shared(x: torch.Tensor, group: int) -> torch.Tensor:
    """`[n, K, D]` -> `[K, group, n, D]` without copying."""
    return x.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the natural log of the sum of exponentials, `[.., t, D]` and `[.., t]` float32."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, lse
    logits = (q @ k.transpose(-1, -2)).float() * scale
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        logits = logits + mask
    lse = logits.logsumexp(-1)
    return (logits - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse


def decode(
    queries: torch.Tensor,
    index: DecodeIndex,
    planes: slice,
    gather: Gather,
    scale: float,
    scales: Scales = UNSCALED,
) -> torch.Tensor:
    """One new token per request over its kept cells (its own, already written, included).

    Args:
        queries: `[batch, H, D]`.
        index: the batch's cells, this step's included.
        planes: the layer's planes.
        scales: what its stored keys and values are multiplied by.

    Returns:
        `[batch, H, D]`.
    """
    num_heads, dim = queries.shape[1:]
    widest = max(index.widest[planes])
    groups = planes.stop - planes.start
    output = torch.empty_like(queries)
    counts = index.counts[planes]
    for members in index.groups:
        whole = members.numel() == queries.shape[0]
        length = widest if whole else int(counts[:, members].max())
        share = max(1, GATHER_BYTES // max(1, length * groups * gather.cell_bytes))
        for part in torch.split(members, share):
            every = part.numel() == queries.shape[0]
            cells = index.cells[planes, :, :length] if every else index.cells[planes, part, :length]
            used = counts if every else counts[:, part]
            out = attend(queries if every else queries[part], gather(cells, scales), used, scale)
            if every:
                return out.view(-1, num_heads, dim)
            output[part] = out.view(-1, num_heads, dim)
    return output
