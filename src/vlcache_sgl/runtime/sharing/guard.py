"""Does a question find what it looks for in a shared copy?  Estimated while its own tokens are prefilled.

For a question's last rows the attention kernel leaves the log-sum-exp over everything that is kept; sketches of what
was evicted give the same over what is not.  Their ratio is the share of attention that goes missing, per row, head and
layer; the reading is its mean, layers weighted by what they are worth to later questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlcache_sgl.runtime.allocator import passed_event
from vlcache_sgl.runtime.sharing.images import PrefixSketch, SharedImage
from vlcache_sgl.runtime.sharing.sketch import KeySketch, missing_share

LAST_ROWS = 4
"""Rows that are read.  Not all rows of a question look for its answer: over all of them, what one misses and what
it would miss anyway lie close together (`docs/sharing.md`)."""


@dataclass
class GuardReading:
    """One question's prefill on a shared copy.

    `missing` is an estimate: sketches are lossy, and rows attend to kept tokens only on their way through the layers.
    """

    image: SharedImage
    sketches: tuple[PrefixSketch, ...]
    first_row: int
    """Position of the first row that is read: behind the last picture and behind what the prefix cache served."""
    length: int
    """Of the prompt."""
    weights: tuple[float, ...]
    """Per layer, sum 1."""
    failure: Exception | None = None
    """Why there is no estimate."""
    _sum: dict[int, torch.Tensor] = field(default_factory=dict)
    _rows: int = 0
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
        if layer == 0:
            self._rows += queries.shape[0]
        parts = [part for sketch in self.sketches if (part := sketch.layers[layer]) is not None]
        if not parts or not queries.shape[0] or not self.weights[layer]:
            return
        share = missing_share(lse, _log_mass(parts, queries, scale)).mean(1).sum()
        known = self._sum.get(layer)
        self._sum[layer] = share if known is None else known + share

    def close(self, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """The last chunk has been computed: bring the reading to the host.  Every rank takes part, failed or not."""
        total = torch.full((1,), torch.nan if self.failure is not None else 0.0, device=device)
        for layer, value in self._sum.items():
            total = total + self.weights[layer] * value / max(1, self._rows)
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

    It comes too late to withhold the answer and is only reported.

    Args:
        sketches, weights: as in `GuardReading`.
        length: of the prompt.
    """

    def __init__(self, sketches: tuple[PrefixSketch, ...], weights: tuple[float, ...], length: int) -> None:
        self._sketches = sketches
        self._weights = weights
        self._length = length
        self._steps: dict[int, float] = {}

    def wants(self, length: int) -> bool:
        """Whether the step that makes the sequence `length` tokens long is read."""
        return self._length < length <= self._length + FIRST_STEPS

    def observe(self, layer: int, length: int, queries: torch.Tensor, keys: torch.Tensor, scale: float) -> None:
        """One step in one layer.

        Args:
            length: of the sequence, this step's token included.
            queries: `[H, D]`, of the step's token.
            keys: `[n, K, D]`, what is kept of the sequence.
            scale: factor of the logits.
        """
        parts = [part for sketch in self._sketches if (part := sketch.layers[layer]) is not None]
        if not parts or not self._weights[layer]:
            return
        heads, dim = queries.shape
        by_head = queries.float().view(keys.shape[1], -1, dim)
        kept = (torch.einsum("kgd,nkd->kgn", by_head, keys.float()) * scale).logsumexp(-1).view(1, heads)
        share = float(missing_share(kept, _log_mass(parts, queries[None], scale)).mean())
        self._steps[length] = self._steps.get(length, 0.0) + self._weights[layer] * share

    def missing(self, answered: int) -> float | None:
        """Mean over the steps that made an answer of `answered` tokens, in [0, 1]; None without a step."""
        last = self._length + answered - 1  # one more step may have run before it was known that the answer had ended
        steps = [share for length, share in self._steps.items() if length <= last]
        return sum(steps) / len(steps) if steps else None


def _log_mass(parts: Sequence[KeySketch], queries: torch.Tensor, scale: float) -> torch.Tensor:
    """`KeySketch.log_mass` over all stretches of a prompt."""
    if len(parts) == 1:
        return parts[0].log_mass(queries, scale)
    return torch.stack([part.log_mass(queries, scale) for part in parts]).logsumexp(0)
