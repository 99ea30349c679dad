"""What a scorer or allocator asks the runtime to compute.  Nothing that is not declared is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

RowKind = Literal["none", "post_vision", "last", "all", "repeat"]


@dataclass(frozen=True)
class Rows:
    """Which of the request's own rows are query rows, whose attention is counted.

    Rows are always rows that this request computes itself: after a prefix hit the rows of the cached part do not
    exist, so ``all`` means all new rows.  ``repeat`` rows are computed for the policy alone.
    """

    kind: RowKind = "none"
    """``none``, ``post_vision``, ``last`` or ``all``; the class methods of these names make them."""
    count: int = 0
    """``last``: how many rows.  ``post_vision``: at most this many, the latest ones (0 = no limit)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(RowKind):
            raise ValueError(f"rows must be one of {', '.join(get_args(RowKind))}, got {self.kind!r}")
        if self.count < (1 if self.kind == "last" else 0):
            raise ValueError(f"{self.kind} rows cannot be {self.count}")

    @classmethod
    def post_vision(cls, limit: int = 0) -> Rows:
        """Text rows after the last vision token (the last 32 rows when nothing follows the image)."""
        return cls("post_vision", limit)

    @classmethod
    def last(cls, count: int) -> Rows:
        """The last `count` rows of the prompt."""
        return cls("last", count)

    @classmethod
    def all(cls) -> Rows:
        """Every new row: attention cost grows with the square of the prompt."""
        return cls("all")

    @classmethod
    def repeat(cls) -> Rows:
        """Rows of a second reading: the prompt is read once more behind itself, after a request to repeat it, and then
        dropped (KVzip, arXiv 2505.23416).  Costs another prefill of the prompt; does not depend on a question."""
        return cls("repeat")


@dataclass(frozen=True)
class Needs:
    """Inputs of one scorer or allocator; see `LayerView` for shapes."""

    rows: Rows = Rows()
    """Which query rows there are; fills `LayerView.row_positions`."""
    column_sum: bool = False
    """Fills `LayerView.column_sum`."""
    column_square_sum: bool = False
    """Fills `LayerView.column_square_sum`."""
    column_max: bool = False
    """Fills `LayerView.column_max`."""
    density: float | None = None
    """Relative threshold p of arXiv 2410.23317, equation 1; fills `LayerView.density`."""
    entropy: bool = False
    """Fills `LayerView.entropy`."""
    probabilities: bool = False
    """The whole matrix `[num_heads, rows, owned]`: only with few rows; fills `LayerView.probabilities`."""
    queries: bool = False
    """Fills `LayerView.queries`, those of `rows`."""
    keys: bool = False
    """Fills `LayerView.keys`."""
    values: bool = False
    """Fills `LayerView.values`."""
    rotary: bool = False
    """`Prompt.rotary` and `Prompt.positions`; a model whose rotary embedding is not known is refused at start."""

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be a threshold in (0, 1], got {self.density}")

    @property
    def reads_attention(self) -> bool:
        """Whether a pass over the keys with the declared rows is needed."""
        return bool(
            self.column_sum
            or self.column_square_sum
            or self.column_max
            or self.density is not None
            or self.entropy
            or self.probabilities
        )
