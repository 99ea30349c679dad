"""What `ResidencyBackend` asks of a kernel library.  Three answer: `torch_native`, `triton` and `flashinfer`.

A provider is told once per forward what is to be computed (`plan_extend`, `plan_decode`) and then once per layer to
compute it.  Keys and values of the new tokens are in the arena before it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from vlcache_sgl.memory.batches import DecodeBatch, ExtendBatch
from vlcache_sgl.memory.layers import LayerCells

Observe = Callable[[int, torch.Tensor | None, torch.Tensor | None], None]
"""``observe(number, prefix, valid)``: what scoring needs to know of the `number`-th request in the layer that was just
attended to.

`prefix` is `[P, 2, K, D]`, the kept keys and values of its earlier tokens, None when it has none; `valid` `[K]` says
how many leading entries of it exist per KV head, None: all.  Both are valid until `observe` returns.
"""


class Provider(Protocol):
    """Attention over cells with one kernel library.

    A provider with `on_device` never makes the host wait for the device in `plan_decode` or `decode`, but for the
    first step after a request's row has changed where its docstring says so.
    """

    on_device: bool
    """Kernels of a GPU: batches carry device tensors, decode can be recorded in CUDA graphs."""

    @property
    def lists(self) -> torch.dtype | None:
        """Type of the lists of cells that its kernels read; None: it reads none."""

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
            observe: called for each request with query rows, in order; not by a provider with `on_device`, where
                `batch_scoring` reads the keys of the whole batch from the arena.

        Returns:
            `[T, H, D]`, and with `ExtendBatch.want_lse` `[T, H]` float32, the natural logarithm of the sum of
            exponentials over all that each new token sees.
        """

    def plan_decode(self, batch: DecodeBatch) -> None:
        """Prepare one decode step, this step's cells included."""

    def decode(self, planes: slice, queries: torch.Tensor, scale: float) -> torch.Tensor:
        """One layer of the planned step, `[B, H, D]` to `[B, H, D]`; rows of padding are undefined."""

    def extend_in_window(
        self, layer: LayerCells, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """`extend` of a layer with a window, which has no query rows.

        Raises:
            NotImplementedError: by a provider that serves none: servers of such models do not start with it.
        """

    def decode_in_window(self, layer: LayerCells, queries: torch.Tensor, scale: float) -> torch.Tensor:
        """`decode` of a layer with a window."""

    def init_graphs(self, max_batch: int) -> None:
        """Lay out what captured graphs read, for batches of up to `max_batch` requests."""

    def fits_graph(self, rows: list[int], lengths: list[int]) -> bool:
        """Whether a step of these requests fits what `init_graphs` laid out; the same on all tensor-parallel ranks."""


class AttentionKernels(NamedTuple):
    """The serving engine's Triton kernels; which arguments they take is written where they are launched."""

    extend: Callable[..., Any]
    decode: Callable[..., Any]


@dataclass(frozen=True)
class HeadShape:
    """The queries of this rank."""

    num_heads: int
    dtype: torch.dtype
