"""How much fits: the arithmetic of pools and admission, shared by the server and `vlcache plan`.

Pure numbers.  A *token* is K and V of one token in all planes; *physical* tokens are what memory holds uncompressed,
*slots* are how many tokens may be known at once.  Of tensor-parallel servers everything is per rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlcache_sgl.config import KVBudget

RESERVED_TOKENS = 2
"""Physical tokens that stay free behind the longest request: SGLang computes one step ahead."""
MAX_CELLS = 2**31 - 1
"""Cell numbers are 32-bit."""
WINDOW_FAMILIES = {"gemma3_text": -1, "gemma4_text": -1}
"""Language models whose layers with a window are served; what SGLang adds to `sliding_window` to have the number of
tokens before its own that a token sees."""


@dataclass(frozen=True)
class WindowShape:
    """Layers of a model that attend to the last tokens only, on one rank."""

    layers: int
    kv_heads: int
    head_dim: int
    tokens: int
    """How many tokens before its own a token sees."""

    def heads_per_cell(self, width: int) -> int:
        """KV heads in a cell that holds `width` numbers of keys: as many as fit and leave no cell half empty.

        Raises:
            ValueError: not one fits.
        """
        fitting = [heads for heads in range(1, self.kv_heads + 1) if self.kv_heads % heads == 0]
        fitting = [heads for heads in fitting if heads * self.head_dim <= width]
        if not fitting:
            raise ValueError(f"heads of {self.head_dim} numbers do not fit cells of {width}")
        return fitting[-1]

    def layers_per_cell(self, width: int) -> int:
        """Layers that share a cell, where all heads of several fit one."""
        return max(1, width // (self.kv_heads * self.head_dim))

    def planes(self, width: int) -> int:
        """Cells of one token in all these layers."""
        return -(-self.layers // self.layers_per_cell(width)) * (self.kv_heads // self.heads_per_cell(width))


@dataclass(frozen=True)
class KVShape:
    """What a model stores per token on one rank."""

    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    groups: int = 1
    """Cells per (layer, token): 1, or the number of KV heads."""
    window: WindowShape | None = None
    """Layers beside these `layers` that attend to the last tokens only."""

    @property
    def width(self) -> int:
        """Numbers of keys in a cell."""
        return (self.kv_heads // self.groups) * self.head_dim

    @property
    def window_planes(self) -> int:
        return 0 if self.window is None else self.window.planes(self.width)

    @property
    def planes(self) -> int:
        return self.layers * self.groups + self.window_planes

    def resident(self, kept: float, length: int) -> float:
        """Uncompressed tokens that a prompt of `length` tokens takes where each of the `layers` keeps `kept`."""
        if self.window is None:
            return kept
        seen = min(length, self.window.tokens)
        return (self.layers * self.groups * kept + self.window_planes * seen) / self.planes

    @property
    def cell_bytes(self) -> int:
        """K and V of one token in one plane."""
        return 2 * self.width * self.element_bytes

    @property
    def token_bytes(self) -> int:
        return self.planes * self.cell_bytes

    @property
    def sketch_bytes(self) -> int:
        """What `--kv-recall` keeps on the device of a token in host memory."""
        return self.layers * self.kv_heads * code_bytes(self.head_dim)


def code_bytes(head_dim: int) -> int:
    """Of the sketch of one key: a bit per dimension, and a factor of 16 bits."""
    return head_dim // 8 + 2


STATES_PER_REQUEST = 5
"""Slots of the pool of states that SGLang sets aside for each running request of a hybrid: its own, two that prompts
leave for the prefix cache, and two that are written meanwhile (strategy ``extra_buffer`` with overlap)."""


def kv_layer_count(text: Mapping[str, Any]) -> int:
    """Layers with a KV cache by a Hugging Face configuration of a language model: all, unless it names other kinds."""
    layers = int(text.get("num_hidden_layers") or 0)
    if kinds := text.get("layer_types"):
        return sum(kind in ("full_attention", "attention") for kind in kinds[: _with_keys(text)])
    return layers // int(text.get("full_attention_interval") or 1)


def window_layer_count(text: Mapping[str, Any]) -> int:
    """Layers that attend to the last tokens only, by the same."""
    return sum(kind == "sliding_attention" for kind in (text.get("layer_types") or ())[: _with_keys(text)])


def _with_keys(text: Mapping[str, Any]) -> int:
    """Layers with keys of their own; those behind them read the keys of others."""
    return int(text.get("num_hidden_layers") or 0) - int(text.get("num_kv_shared_layers") or 0)


@dataclass(frozen=True)
class StateShape:
    """What the Gated Delta Networks of a hybrid keep per request on one rank, however long it is."""

    layers: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    convolution: int
    """Tokens that a causal convolution sees."""
    element_bytes: int
    """Of the convolution's inputs; the states themselves are float32."""

    @property
    def slot_bytes(self) -> int:
        """One state of all layers."""
        channels = 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
        inputs = channels * (self.convolution - 1) * self.element_bytes
        return self.layers * (inputs + self.value_heads * self.value_dim * self.key_dim * 4)

    def slots_in(self, memory: float, ratio: float) -> int:
        """States in `memory` bytes that KV cache and states share, `ratio` being the states' part over the cache's.

        SGLang keeps one more, which nobody gets.
        """
        return max(0, int((memory * ratio / (1 + ratio) - self.slot_bytes) // self.slot_bytes))


@dataclass(frozen=True)
class Pool:
    """What a server holds."""

    physical_tokens: int
    slots: int


def compressed_pool(
    stock_tokens: int,
    shape: KVShape,
    overcommit: float,
    *,
    graph_lists: bool,
    host_tokens: int = 0,
    sketches: bool = False,
) -> Pool:
    """The pool in the bytes of `stock_tokens` uncompressed tokens.

    Tokens in host memory, `host_tokens` at most, have slots in addition, and with `sketches` sketches of their keys.

    Out of the same memory come, per slot, its row of the residency table (4 bytes per plane), its counters and lists
    (17); per cell, its entry in the list of free cells (4); and, with `graph_lists`, the lists of cells that recorded
    decode graphs read (twice 8 bytes per cell, in two buffers).
    """
    slot_bytes = 4 * shape.planes + 17
    cell_overhead = (4 + (32 if graph_lists else 0)) * shape.planes
    memory = stock_tokens * shape.token_bytes - host_tokens * (slot_bytes + shape.sketch_bytes * sketches)
    physical = max(1, memory // int(shape.token_bytes + overcommit * slot_bytes + cell_overhead))
    return Pool(physical, int(physical * overcommit) + host_tokens)


POOLS_IN_HOST = 2
"""``--kv-host-memory auto`` in units of the KV pool, where the machine has as much."""


def longest_answer(prompt_tokens: int, max_new_tokens: int, capacity: int) -> int | None:
    """How many of `max_new_tokens` fit behind a prompt alone in `capacity` tokens; None: not even the prompt."""
    if prompt_tokens + RESERVED_TOKENS > capacity:
        return None
    return max(0, min(max_new_tokens, capacity - prompt_tokens - RESERVED_TOKENS))


def resident_tokens(prompt_tokens: int, shape: KVShape, budget: KVBudget | None) -> float:
    """Physical tokens that a prompt holds after its prefill; `budget` None: it is not compressed."""
    if budget is None or budget.keeps_all:
        return float(prompt_tokens)
    return shape.resident(budget.target(prompt_tokens, prompt_tokens, shape.layers) / shape.layers, prompt_tokens)


def requests_in_flight(pool: Pool, prompt_tokens: int, resident: float, new_tokens: int) -> int:
    """Requests that can run at once, all of one size, each decoding `new_tokens`, nothing of them cached before.

    All but the last are compressed; the last is still whole, because that is how it was admitted.
    """
    if longest_answer(prompt_tokens, new_tokens, pool.physical_tokens) != new_tokens:
        return 0
    others = (pool.physical_tokens - prompt_tokens - new_tokens) / (resident + new_tokens)
    return min(int(others) + 1, pool.slots // (prompt_tokens + new_tokens))


def cached_prompts(pool: Pool, prompt_tokens: int, resident: float) -> int:
    """Prompts that the prefix cache knows when nothing runs: answers are leaves and go before what they follow."""
    return requests_in_flight(pool, prompt_tokens, resident, 0)
