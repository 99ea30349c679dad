"""Does a question find what it looks for in a shared copy?  Estimated while its own tokens are prefilled.

For a question's last rows the attention kernel leaves the log-sum-exp over everything that is kept; sketches of what
was evicted give the same over what is not.  Their ratio is the share of attention that goes missing, per row, head and
layer; the reading is its mean, layers weighted by what they are worth to later questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlcache_sgl.compression.sharing.images import PrefixSketch
from vlcache_sgl.compression.sharing.sketch import missing_share
from vlcache_sgl.memory.events import passed_event

Row = tuple[torch.Tensor, torch.Tensor]
"""Queries `[R, H, D]` of some rows in one layer, and `[R, H]` float32, their log-sum-exp over what they see."""
LAST_ROWS = 4
"""Rows that are read.  Not all rows of a question look for its answer: over all of them, what one misses and what
it would miss anyway lie close together (`docs/sharing.md`)."""


@dataclass
class GuardReading:
    """One question's prefill on a shared copy.

    `missing` is an estimate: sketches are lossy, and rows attend to kept tokens only on their way through the layers.
    """

    sketches: tuple[PrefixSketch, ...]
    first_row: int
    """Position of the first row that is read: behind the last picture and behind what the prefix cache served."""
    length: int
    """Of the prompt."""
    weights: tuple[float, ...]
    """Per layer, sum 1."""
    failure: Exception | None = None
    """Why there is no estimate."""
    _seen: dict[int, list[Row]] = field(default_factory=dict)
    _scale: float = 1.0
    _copied: torch.Tensor | None = None
    _event: Any = None

    def rows(self, begin: int, count: int) -> slice:
        """Which of a chunk's `count` tokens from position `begin` are read."""
        return slice(min(max(0, self.first_row - begin), count), min(max(0, self.length - begin), count))

    def observe(self, layer: int, queries: torch.Tensor, lse: torch.Tensor, scale: float) -> None:
        """Read one layer of one chunk.

        Args:
            queries: `[R, H, D]`, the question's rows.
            lse: `[R, H]` float32, natural logarithm of the sum of exponentials over what they see.
            scale: factor of the logits.
        """
        if queries.shape[0] and self.weights[layer]:
            self._scale = scale
            # Copies of a few rows: the tensors that they are part of may be large.
            self._seen.setdefault(layer, []).append((queries.clone(), lse.clone()))

    def close(self, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """The last chunk has been computed: bring the reading to the host.  Every rank takes part, failed or not."""
        total = torch.zeros(1, device=device)
        try:
            rows = {layer: (torch.cat(q), torch.cat(lse)) for layer, (q, lse) in _columns(self._seen).items()}
            total += mean_missing(self.sketches, self.weights, rows, self._scale)
        except Exception as error:
            self.failure = error
        self._seen.clear()
        if self.failure is not None:
            total.fill_(torch.nan)
        total = mean_over_ranks(total)
        if device.type != "cpu":
            total = torch.empty(1, pin_memory=True).copy_(total, non_blocking=True)
        self._copied, self._event = total, passed_event(device)

    @property
    def closed(self) -> bool:
        return self._copied is not None

    @property
    def missing(self) -> float:
        """Share of the question's attention that evicted tokens would get, in [0, 1]; NaN where it is not known.

        Waits for the device.
        """
        assert self._copied is not None
        if self._event is not None:
            self._event.synchronize()
        return float(self._copied)


FIRST_STEPS = 2
"""Decode steps of a question about a shared picture that are read."""


class DecodeReading:
    """A second look, at the first decode steps: what an answer looks up just in time no prefill row has looked for.

    Args:
        sketches, weights: as in `GuardReading`.
        length: of the prompt.
    """

    def __init__(self, sketches: tuple[PrefixSketch, ...], weights: tuple[float, ...], length: int) -> None:
        self.sketches = sketches
        self._weights = weights
        self._length = length
        self._queries: dict[int, list[torch.Tensor]] = {}
        self._scale = 1.0
        self._steps = 0
        self._share = math.nan
        self.failure: Exception | None = None
        """Why there is no estimate."""
        self.judged = False
        """Whether it has had its consequences."""

    def wants(self, length: int) -> bool:
        """Whether the step that makes the sequence `length` tokens long is read."""
        return self._length < length <= self._length + FIRST_STEPS

    def observe(self, layer: int, queries: torch.Tensor, scale: float) -> None:
        """One layer of the present step.

        Args:
            queries: `[H, D]`, of the step's token.
            scale: factor of the logits.
        """
        if self._weights[layer]:
            self._scale = scale
            self._queries.setdefault(layer, []).append(queries.clone())

    def end_step(
        self, keys_of: Callable[[int], torch.Tensor], mean_over_ranks: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """All layers of the present step have been computed.  Every rank takes part, failed or not.

        Args:
            keys_of: layer -> `[n, K, D]`, what is kept of the sequence, the step's token included.
        """
        self._steps += 1
        if not self.complete:
            return
        share = torch.full((1,), torch.nan)
        try:
            rows = {layer: self._rows(queries, keys_of(layer)) for layer, queries in self._queries.items()}
            share[0] = mean_missing(self.sketches, self._weights, rows, self._scale)
        except Exception as error:
            self.failure = error
        self._queries.clear()
        self._share = float(mean_over_ranks(share))

    def _rows(self, steps: list[torch.Tensor], keys: torch.Tensor) -> Row:
        """All steps in one layer, and what each sees of `keys` `[n, K, D]`: those of later steps are the last ones."""
        queries = torch.stack(steps)
        count, heads, dim = queries.shape
        by_head = queries.float().view(count, keys.shape[1], -1, dim)
        logits = torch.einsum("skgd,nkd->skgn", by_head, keys.float()) * self._scale
        later = torch.ones(count, keys.shape[0], dtype=torch.bool).triu(keys.shape[0] - count + 1)
        return queries, logits.masked_fill(later[:, None, None], -math.inf).logsumexp(-1).view(count, heads)

    @property
    def complete(self) -> bool:
        """Whether all steps have been read."""
        return self._steps >= FIRST_STEPS

    @property
    def missing(self) -> float | None:
        """Share of these steps' attention that evicted tokens would get, in [0, 1]; None where it is not known."""
        return None if math.isnan(self._share) else self._share


def _columns(seen: Mapping[int, Sequence[Row]]) -> dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """By layer, queries and log-sum-exps of all chunks."""
    return {layer: ([q for q, _ in rows], [lse for _, lse in rows]) for layer, rows in seen.items()}


def mean_missing(
    sketches: Sequence[PrefixSketch], weights: Sequence[float], rows: Mapping[int, Row], scale: float
) -> torch.Tensor:
    """Share of the attention of some rows that evicted tokens would get, `[]` float32.

    Layers without a sketch miss nothing.

    Args:
        sketches: of all stretches of the prompt.
        weights: per layer, sum 1.
        rows: by layer.
        scale: factor of the logits.
    """
    evicted: dict[int, list[torch.Tensor]] = {}
    for sketch in sketches:
        for layers, keys in sketch.groups:
            found = keys.log_mass(torch.cat([rows[layer][0] for layer in layers], 1), scale)
            for layer, mass in zip(layers, found.chunk(len(layers), 1), strict=True):
                evicted.setdefault(layer, []).append(mass)
    if not evicted:
        return torch.zeros(())
    masses = torch.stack([part[0] if len(part) == 1 else torch.stack(part).logsumexp(0) for part in evicted.values()])
    shares = missing_share(torch.stack([rows[layer][1] for layer in evicted]), masses).mean((1, 2))
    return (shares * torch.tensor([weights[layer] for layer in evicted], device=shares.device)).sum()
