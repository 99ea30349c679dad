# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Copying cells on a GPU: one launch for all planes; either side may be pinned host memory.

Per token and plane 8 to 16 bytes of numbers are read, and the cell once on each side.  Over the bus what counts is how
many loads are in flight: a program holds up to 16 kB.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlcache_kernels.variants import alignment

# Elements that a program holds.
BLOCK_ELEMENTS = 8192
# Elements of one cell per program; a cell of more is cut.
MAX_WIDTH = 2048


@triton.jit(
    do_not_specialize=[
        "tokens",
        "stride_out",
        "stride_to_plane",
        "stride_to",
        "stride_source",
        "stride_number_plane",
        "stride_number",
    ],
    do_not_specialize_on_alignment=["to", "numbers"],
)
def copy_kernel(
    out,  # out [P, N, WIDTH], row stride WIDTH, plane stride stride_out
    to,  # [P, n] int, strides stride_to_plane, stride_to
    source,  # [P, M, WIDTH], plane stride stride_source
    numbers,  # [P, n] int, strides stride_number_plane, stride_number
    tokens,  # n
    stride_out: tl.int64,  # a multiple of WIDTH, like stride_source
    stride_to_plane: tl.int64,
    stride_to: tl.int64,
    stride_source: tl.int64,
    stride_number_plane: tl.int64,
    stride_number: tl.int64,
    WIDTH: tl.constexpr,  # 2 * heads_per_cell * D
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ALIGN: tl.constexpr,  # divides WIDTH
):
    """One program: BLOCK_T tokens in one plane, BLOCK_W elements of each of their cells."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    plane = tl.program_id(1).to(tl.int64)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    stride_out = tl.multiple_of(stride_out, ALIGN)
    stride_source = tl.multiple_of(stride_source, ALIGN)
    there = t < tokens
    t = t.to(tl.int64)
    target = tl.load(to + plane * stride_to_plane + t * stride_to, mask=there, other=-1).to(tl.int64)
    origin = tl.load(numbers + plane * stride_number_plane + t * stride_number, mask=there, other=-1).to(tl.int64)
    mask = ((target >= 0) & (origin >= 0))[:, None] & (w < WIDTH)[None, :]
    cell = tl.load(source + plane * stride_source + origin[:, None] * WIDTH + w[None, :], mask=mask)
    tl.store(out + plane * stride_out + target[:, None] * WIDTH + w[None, :], cell, mask=mask)


def copy_cells(out: torch.Tensor, to: torch.Tensor, source: torch.Tensor, numbers: torch.Tensor) -> None:
    """See `vlcache_kernels.copy_cells.copy_cells`: one launch."""
    planes, tokens = to.shape
    width = out[0, 0].numel()
    block_w = min(MAX_WIDTH, triton.next_power_of_2(width))
    block_t = max(1, BLOCK_ELEMENTS // block_w)
    copy_kernel[(triton.cdiv(tokens, block_t), planes, triton.cdiv(width, block_w))](
        out,
        to,
        source,
        numbers,
        tokens,
        out.stride(0),
        *to.stride(),
        source.stride(0),
        *numbers.stride(),
        WIDTH=width,
        BLOCK_T=block_t,
        BLOCK_W=block_w,
        ALIGN=alignment(width),
        num_warps=4,
    )
