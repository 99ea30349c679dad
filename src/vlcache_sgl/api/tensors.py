"""The values that scorers and allocators read; shapes are documented here once.

Letters: `H` query heads, `K` KV heads, `D` head dim, `L` layers, `R` rows that vote, `n` tokens of the prompt,
`m = n - start` *owned* tokens: those this request computed itself and may evict.  With tensor parallelism heads are
those of all ranks for scores and of the own rank for keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from vlcache_sgl.budget import water_fill


class Span(NamedTuple):
    """Half-open range of prompt positions."""

    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin


class Rotary(Protocol):
    """The model's rotary embedding, so that a policy can undo or redo it.  Hashable; the same object in every layer."""

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """`x` `[..., T, D]` rotated to `positions` `[T]` (text) or `[3, T]` (M-RoPE); same dtype."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Prompt:
    """What is known of one request when its prefill has ended."""

    length: int
    """`n`, tokens of the whole prompt after image expansion."""
    start: int
    """First owned position; `[0, start)` came from the prefix cache or lies in front of the first image, and is never
    touched."""
    vision: tuple[Span, ...]
    """Vision tokens, absolute positions, ascending, disjoint."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rotary: Rotary | None = None
    positions: torch.Tensor | None = None
    """Owned tokens' rotary positions, `[m]` or `[3, m]` int64; only where a policy declares `rotary`."""

    @property
    def owned(self) -> int:
        """`m`, tokens that may be evicted."""
        return self.length - self.start

    @property
    def owned_vision(self) -> int:
        """Owned tokens that came from an image or a video."""
        return sum(max(end - self.start, 0) - max(begin - self.start, 0) for begin, end in self.vision)

    def is_vision(self) -> torch.Tensor:
        """`[m]` bool: owned tokens that came from an image or a video."""
        mask = torch.zeros(self.owned, dtype=torch.bool, device=self.device)
        for begin, end in self.vision:
            mask[max(begin - self.start, 0) : max(end - self.start, 0)] = True
        return mask


@dataclass
class LayerView:
    """One layer of one request.  Fields that were not declared in `Needs` are None.

    Attention probabilities are softmax over all visible keys (prefix hits included), float32, RoPE applied.  The
    `g = H / K` query heads of a KV head are reduced by mean (`column_max`: by max).
    """

    index: int
    """Layer number, 0-based."""
    row_positions: torch.Tensor | None = None
    """`[R]` int64, absolute positions of the voting rows, ascending."""
    column_sum: torch.Tensor | None = None
    """`[K, m]` float32: sum over rows of the probability of each owned key."""
    column_square_sum: torch.Tensor | None = None
    """`[K, m]` float32: sum over rows of the squared probability."""
    column_max: torch.Tensor | None = None
    """`[K, m]` float32: maximum over rows and query heads."""
    density: torch.Tensor | None = None
    """`[K]` float32 in [0, 1]: share of visible entries at least p times their row maximum (2410.23317, eq. 1-2)."""
    entropy: torch.Tensor | None = None
    """`[K]` float32, nats: mean over rows of the entropy of a row."""
    probabilities: torch.Tensor | None = None
    """`[H, R, m]` float32, entries of future keys are 0."""
    queries: torch.Tensor | None = None
    """`[H, R, D]` post-RoPE."""
    keys: torch.Tensor | None = None
    """`[K, m, D]` post-RoPE, as cached."""
    values: torch.Tensor | None = None
    """`[K, m, D]` as cached."""
    scores: torch.Tensor | None = None
    """`[K, m]` float32, higher = keep: what the scorer said; set before allocators run."""

    @property
    def num_rows(self) -> int:
        return 0 if self.row_positions is None else int(self.row_positions.numel())


def declared(value: torch.Tensor | None) -> torch.Tensor:
    """A field of `LayerView` that `needs` declares: ``declared(layer.column_sum)``.

    Raises:
        LookupError: the field is None, so `needs` does not declare it.
    """
    if value is None:
        raise LookupError("this field of the layer is not declared in `needs`")
    return value


@dataclass(frozen=True)
class Budget:
    """How much may stay.  Units are tokens of one layer; `total` is their sum over layers."""

    total: int
    num_layers: int
    lo: int
    """Least tokens of a layer."""
    hi: int
    """Most tokens of a layer: the owned tokens."""

    @property
    def ratio(self) -> float:
        """Kept share of the owned tokens, in [0, 1]."""
        return self.total / max(1, self.num_layers * self.hi)

    def distribute(self, weights: torch.Tensor) -> torch.Tensor:
        """Integer tokens per layer in proportion to `weights` `[L]` (any float, >= 0), `[L]` int64 on the CPU.

        Every layer gets ``clip(scale * weight, lo, hi)`` with the one `scale` that makes the sum `total` (water
        filling); fractions are rounded by largest remainder, ties to the lower layer.  The sum is exact.
        """
        return water_fill(weights, total=self.total, lo=self.lo, hi=self.hi)
