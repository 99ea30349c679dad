"""What `ResidencyBackend` asks of a kernel library.  Three answer: `torch_native`, `triton` and `flashinfer`.

A provider is told once per forward what is to be computed (`plan_extend`, `plan_decode`) and then once per layer to
compute it.  Keys and values of the new tokens are in the arena before it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from vlcache_sgl.runtime.residency import Residency

Observe = Callable[[int, torch.Tensor | None, torch.Tensor | None], None]
"""``observe(number, prefix, valid)``: what voting needs to know of the `number`-th request in the layer that was just
attended to.

`prefix` is `[P, 2, K, D]`, the kept keys and values of its earlier tokens, None when it has none; `valid` `[K]` says
how many leading entries of it exist per KV head, None: all.  Both are valid until `observe` returns.
"""


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

    @property
    def num_layers(self) -> int:
        return self.residency.num_planes // self.groups

    def layer_of(self, planes: slice) -> int:
        """The layer (counted from 0 on this rank) whose planes these are."""
        return int(planes.start) // self.groups


@dataclass(frozen=True)
class ExtendRequest:
    """One request of a prefill batch."""

    row: int
    """Its row of `req_to_token`."""
    tokens: slice
    """Its rows in the batch."""
    begin: int
    """Position of its first new token."""
    votes: bool = False
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


class Provider(Protocol):
    """Attention over cells with one kernel library.

    A provider with `on_device` never makes the host wait for the device in `plan_decode` or `decode`, but for the
    first step after a request's row has changed where its docstring says so.
    """

    on_device: bool
    """Kernels of a GPU: batches carry device tensors, decode can be recorded in CUDA graphs."""

    def invalidate(self, row: int) -> None:
        """The slots of a request row have changed: forget what is known of its cells."""

    def plan_extend(self, batch: ExtendBatch) -> None:
        """Prepare one prefill forward; the rows of the batch are invalidated."""

    def extend(
        self,
        planes: slice,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        observe: Observe,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One layer of the planned prefill.

        Args:
            planes: the layer's planes.
            queries: `[T, H, D]`.
            keys, values: `[T, K, D]`, of the new tokens, also in the arena.
            scale: factor of the logits.
            observe: called for each request that votes, in order; not by a provider with `on_device`, where
                `batch_scoring` reads the keys of the whole batch from the arena.

        Returns:
            `[T, H, D]`, and with `ExtendBatch.want_lse` `[T, H]` float32, the natural logarithm of the sum of
            exponentials over all that each new token sees.
        """

    def plan_decode(self, batch: DecodeBatch) -> None:
        """Prepare one decode step, this step's cells included."""

    def decode(self, planes: slice, queries: torch.Tensor, scale: float) -> torch.Tensor:
        """One layer of the planned step, `[B, H, D]` to `[B, H, D]`; rows of padding are undefined."""

    def init_graphs(self, max_batch: int) -> None:
        """Lay out what captured graphs read, for batches of up to `max_batch` requests."""

    def fits_graph(self, rows: list[int], lengths: list[int]) -> bool:
        """Whether a step of these requests fits what `init_graphs` laid out; the same on all tensor-parallel ranks."""


@dataclass(frozen=True)
class HeadShape:
    """The queries of this rank."""

    num_heads: int
    dtype: torch.dtype


def make_provider(name: str, memory: Memory, shape: HeadShape, *, kv_splits: int = 8) -> Provider:
    """The provider that takes the place of SGLang's attention backend `name`.

    Args:
        kv_splits: most parts that Triton cuts one request's keys into (SGLang's --triton-attention-num-kv-splits).
    """
    if name == "triton":
        from vlcache_sgl.runtime.attention.triton_provider import TritonProvider

        return TritonProvider(memory, shape, kv_splits=kv_splits)
    if name == "flashinfer":
        from vlcache_sgl.runtime.attention.flashinfer_provider import FlashInferProvider

        return FlashInferProvider(memory, shape)
    from vlcache_sgl.runtime.attention.torch_provider import TorchProvider

    return TorchProvider(memory)
