# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Arena write on a GPU: K and V through residency in one launch.

Per token, K and V are read once and written once, ``4 * K * D`` elements; per token and plane, 4 to 8 bytes of slot and
4 of residency.  A cell's K and V lie side by side: one program writes ``2 * heads_per_cell * D`` elements in a stretch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlcache_kernels.variants import alignment

# Elements of K that a program holds: with V 16 kB in bf16, enough loads in flight at 4 warps without spilling.
BLOCK_ELEMENTS = 4096
# Elements of one cell per program; a cell of more (heads_per_cell * D) is cut.
MAX_WIDTH = 1024


@triton.jit(
    do_not_specialize=["tokens", "stride_kt", "stride_vt", "stride_plane"],
    do_not_specialize_on_alignment=["slots", "residency"],
)
def store_kernel(
    arena,  # out [num_cells, 2, heads_per_cell, D], element strides CELL, heads_per_cell * D, D, 1
    keys,  # [T, K, D], element strides stride_kt, D, 1
    values,  # [T, K, D], element strides stride_vt, D, 1
    slots,  # [T] int
    residency,  # [G, num_slots] int32, row stride stride_plane
    tokens,  # T
    stride_kt,
    stride_vt,
    stride_plane,
    key_scale,  # float32; only with SCALED
    value_scale,
    WIDTH: tl.constexpr,  # heads_per_cell * D
    CELL: tl.constexpr,  # at least 2 * WIDTH
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SCALED: tl.constexpr,  # divide, in float32
    ALIGN: tl.constexpr,  # divides stride_kt and stride_vt: rows are then read in vectors
):
    """One program: BLOCK_T tokens in one plane, BLOCK_W elements of each of their cells, K and V."""
    stride_kt = tl.multiple_of(stride_kt, ALIGN)
    stride_vt = tl.multiple_of(stride_vt, ALIGN)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    plane = tl.program_id(1).to(tl.int64)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    slot = tl.load(slots + t, mask=t < tokens, other=0).to(tl.int64)
    cell = tl.load(residency + plane * stride_plane + slot, mask=t < tokens, other=-1).to(tl.int64)
    mask = (cell >= 0)[:, None] & (w < WIDTH)[None, :]
    from_ = plane * WIDTH + w[None, :]
    token = t.to(tl.int64)[:, None]
    k = tl.load(keys + token * stride_kt + from_, mask=mask)
    v = tl.load(values + token * stride_vt + from_, mask=mask)
    if SCALED:
        k = k.to(tl.float32) / key_scale
        v = v.to(tl.float32) / value_scale
    to = arena + cell[:, None] * CELL + w[None, :]
    tl.store(to, k.to(arena.dtype.element_ty), mask=mask)
    tl.store(to + WIDTH, v.to(arena.dtype.element_ty), mask=mask)


def arena_write(
    arena: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    residency: torch.Tensor,
    key_scale: float,
    value_scale: float,
) -> None:
    """See `vlcache_kernels.arena_write.arena_write`: one launch."""
    _, _, heads_per_cell, head_dim = arena.shape
    tokens = slots.numel()
    # Heads of a token side by side; the distance between tokens is free (a slice of the fused projection).
    align = alignment(head_dim)
    keys, values = (
        x if x.stride(2) == 1 and x.stride(1) == head_dim and x.stride(0) % align == 0 else x.contiguous()
        for x in (keys, values)
    )
    residency = residency if residency.stride(1) == 1 else residency.contiguous()
    width = heads_per_cell * head_dim
    block_w = min(MAX_WIDTH, triton.next_power_of_2(width))
    block_t = max(1, BLOCK_ELEMENTS // block_w)
    store_kernel[(triton.cdiv(tokens, block_t), residency.shape[0], triton.cdiv(width, block_w))](
        arena,
        keys,
        values,
        slots.contiguous(),
        residency,
        tokens,
        keys.stride(0),
        values.stride(0),
        residency.stride(0),
        key_scale,
        value_scale,
        WIDTH=width,
        CELL=arena.stride(0),
        BLOCK_T=block_t,
        BLOCK_W=block_w,
        SCALED=(key_scale, value_scale) != (1.0, 1.0),
        ALIGN=align,
        num_warps=4,
    )
