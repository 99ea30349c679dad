"""The values that scorers and allocators read; shapes are documented here once.

Letters: `H` query heads, `K` KV heads, `D` head dim, `L` layers, `R` query rows, `n` tokens of the prompt,
`m = n - start` *owned* tokens: those this request computed itself and may evict.  With tensor parallelism heads are
those of all ranks for scores and of the own rank for keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch

from vlcache_sgl.api.budget import water_fill
from vlcache_sgl.streams import to_device


class Span(NamedTuple):
    """Half-open range of prompt positions."""

    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Grid:
    """How the tokens of one look at an image, or of one frame of a video, lie on it: row by row, from the top."""

    rows: int
    """Rows of tokens, after the model has merged patches into tokens."""
    columns: int
    """Tokens of a row that are places of the image."""
    newlines: bool = False
    """Whether each row ends with one more token that is no place of the image (LLaVA's tiles)."""
    fit: Literal["stretch", "pad"] = "stretch"
    """``stretch``: the grid covers the whole image; ``pad``: it covers the square around the centred image."""

    @property
    def tokens(self) -> int:
        """Tokens that lie on the grid, newlines included."""
        return self.rows * (self.columns + self.newlines)


class Patches(NamedTuple):
    """Where owned tokens lie on their images: five tensors `[m]` int64, -1 for a token that lies on no known grid
    (text, and vision tokens of models that do not say)."""

    grid: torch.Tensor
    """Number of the grid within the token's span: the frame of a video that is one span; 0 = LLaVA's overview."""
    row: torch.Tensor
    """From 0 at the top."""
    column: torch.Tensor
    """From 0 at the left; equal to `columns` for the newline at the end of a row."""
    rows: torch.Tensor
    """Rows of that grid."""
    columns: torch.Tensor
    """Columns of that grid, newlines not counted."""


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
    """`L`."""
    num_heads: int
    """`H`."""
    num_kv_heads: int
    """`K`."""
    head_dim: int
    """`D`."""
    layer_weights: tuple[float, ...] = ()
    """`L` shares in [0, 1]: how much of its tokens each layer of this model needs, measured beforehand
    (``--kv-weights``); empty when not known."""
    head_weights: tuple[tuple[float, ...], ...] = ()
    """`[L][K]`, the same per KV head; empty when not known."""
    repeated: int = 0
    """Rows of the second reading, at positions from `length` on; 0 unless a policy declares ``Rows.repeat()``."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the tensors of the layers are, and where tensors made by a policy belong."""
    rotary: Rotary | None = None
    """The model's rotary embedding; rely on it only where a policy declares `rotary`."""
    positions: torch.Tensor | None = None
    """Owned tokens' rotary positions, `[m]` or `[3, m]` int64; only where a policy declares `rotary`."""
    grids: tuple[tuple[Grid, ...], ...] = ()
    """Per span of `vision`, the grids that its tokens lie on, in their order: one for an image, one per frame for a
    video (a video may also have a span per frame), an overview and its tiles for LLaVA; an empty tuple where the
    model does not say.  Empty as a whole when nothing is known."""

    @property
    def owned(self) -> int:
        """`m`, tokens that may be evicted."""
        return self.length - self.start

    @property
    def owned_vision(self) -> int:
        """Owned tokens that came from an image or a video."""
        return sum(max(end - self.start, 0) - max(begin - self.start, 0) for begin, end in self.vision)

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, made on the CPU, on `device`: a GPU is not waited for, as ``values.to(device)`` would."""
        return to_device(values, self.device)

    def is_vision(self) -> torch.Tensor:
        """`[m]` bool: owned tokens that came from an image or a video."""
        mask = torch.zeros(self.owned, dtype=torch.bool, device=self.device)
        for begin, end in self.vision:
            mask[max(begin - self.start, 0) : max(end - self.start, 0)] = True
        return mask

    def patches(self) -> Patches:
        """Row and column of every owned token on its image, for priors in two dimensions; see `Patches`."""
        places = torch.full((len(Patches._fields), self.length), -1, dtype=torch.int64, device=self.device)
        for (begin, _), grids in zip(self.vision, self.grids, strict=False):  # no grids: nothing is known
            for number, grid in enumerate(grids):
                end = begin + grid.tokens
                token = torch.arange(grid.tokens, device=self.device)
                width = grid.columns + grid.newlines
                places[0, begin:end] = number
                places[1, begin:end] = token // width
                places[2, begin:end] = token % width
                places[3, begin:end] = grid.rows
                places[4, begin:end] = grid.columns
                begin = end
        return Patches(*places[:, self.start :])


@dataclass
class LayerView:
    """One layer of one request.  Fields that were not declared in `Needs` are None.

    Attention probabilities are softmax over all visible keys (prefix hits included), float32, RoPE applied.  The
    `g = H / K` query heads of a KV head are reduced by mean (`column_max`: by max).
    """

    index: int
    """Layer number, 0-based."""
    row_positions: torch.Tensor | None = None
    """`[R]` int64, absolute positions of the query rows, ascending."""
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
    """`[G, m]` float32, higher = keep: what tokens compete with, set before allocators run.  `G` is 1 where all KV
    heads keep one set (``heads=shared``: their mean or maximum), else `K`; runs (``span``) share their mean."""

    @property
    def num_rows(self) -> int:
        """`R`, query rows."""
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
    """Tokens to keep, summed over layers."""
    num_layers: int
    """`L`."""
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

    def distribute_heads(self, weights: torch.Tensor) -> torch.Tensor:
        """Integer tokens per KV head in proportion to `weights` `[L, K]`, `[L, K]` int64 on the CPU.

        As `distribute`, over all heads of all layers: their sum is `K` times `total`, bounds are those of every head.
        """
        heads = weights.shape[1]
        counts = water_fill(weights.flatten(), total=self.total * heads, lo=self.lo, hi=self.hi)
        return counts.view(-1, heads)
