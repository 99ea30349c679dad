"""The shapes that `check.py` measures; `TINY` is the dry run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """The shapes of a language model that matter here."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int

    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of one layer's projections: QKV, output, gate and up, down."""
        query, both = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        return [
            (query + both, self.hidden),
            (self.hidden, query),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        ]


LLAVA = Model("LLaVA-1.6-Mistral-7B", 32, 32, 8, 128, 4096, 14336)
QWEN = Model("Qwen2.5-VL-7B", 28, 28, 4, 128, 3584, 18944)


@dataclass(frozen=True)
class Sizes:
    models: tuple[Model, ...] = (LLAVA, QWEN)
    rows: int = 50
    """Query rows that are scored with."""
    prompts: tuple[int, ...] = (2048, 8192, 32768, 131072)
    """Keys of (a) and (d)."""
    context: int = 32768
    """Tokens of each request in (b) and (c)."""
    batches: tuple[int, ...] = (1, 4, 16, 64)
    budgets: tuple[float, ...] = (1.0, 0.2, 0.1, 0.05)
    index_budgets: tuple[float, ...] = (1.0, 0.1)
    """Budgets of (c)."""
    arena_bytes: int = 24 << 30
    """Room for the layers that (b) measures: as many as fit at budget 1.0, at least one."""
    copy_bytes: int = 4 << 30
    cache_bytes: int = 192 << 20
    """Inputs of one measurement are repeated until they are this large: three times an H200's L2."""


TINY = Sizes(
    models=(Model("tiny", 2, 4, 2, 16, 32, 64),),
    rows=3,
    prompts=(40,),
    context=40,
    batches=(16,),
    budgets=(1.0, 0.1),
    index_budgets=(0.1,),
    arena_bytes=1 << 15,
    copy_bytes=1 << 16,
    cache_bytes=1 << 10,
)
