"""What several scorers do to a row of scores.  All functions take and return `[K, m]` float32, higher = keep."""

from __future__ import annotations

from typing import Literal

import torch


def pool(scores: torch.Tensor, kernel: int, kind: Literal["avg", "max"] = "avg") -> torch.Tensor:
    """Smooth along the tokens: stride 1, zeros beyond the ends, an average divides by `kernel` there too.

    Args:
        scores: `[K, m]`, not negative when `kind` is ``max``.
        kernel: odd window width in tokens; 1 changes nothing.
    """
    if kernel == 1 or scores.shape[-1] == 0:
        return scores
    function = torch.nn.functional.avg_pool1d if kind == "avg" else torch.nn.functional.max_pool1d
    return function(scores, kernel, stride=1, padding=kernel // 2)


def keep_last(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` tokens moved above all others of their head, the latest on top."""
    count = min(count, scores.shape[-1])
    if count <= 0:
        return scores
    rest = scores[..., : scores.shape[-1] - count]
    return torch.cat([rest, _above(rest, count)], dim=-1)


def keep_first(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` tokens moved above all others of their head, the first on top."""
    count = min(count, scores.shape[-1])
    if count <= 0:
        return scores
    rest = scores[..., count:]
    return torch.cat([_above(rest, count).flip(-1), rest], dim=-1)


def minmax(scores: torch.Tensor) -> torch.Tensor:
    """Every head scaled to [0, 1]; a constant head becomes 0."""
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return (scores - low) / (high - low).clamp(min=1e-12)


def zscore(scores: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1 over all heads and tokens together; constant scores become 0."""
    if scores.numel() < 2:
        return torch.zeros_like(scores)
    return (scores - scores.mean()) / scores.std().clamp(min=1e-6)


def _above(rest: torch.Tensor, count: int) -> torch.Tensor:
    """`[K, count]` rising values, each at least 1 above everything in `rest`."""
    top = rest.amax(-1, keepdim=True) if rest.shape[-1] else torch.zeros_like(rest.sum(-1, keepdim=True))
    return top + 1 + torch.arange(1, count + 1, dtype=rest.dtype, device=rest.device) / count
