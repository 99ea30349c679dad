"""Sketches of keys to choose from: what each would estimate of a query's logits, at about 10 bytes a token at D = 64.

`B` stands for all pairs of a layer and a KV head.  A sketch gives estimates, not codes: bytes are counted by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.judge.turn import Basis, Moments, Turn, TurnedSketch, balanced, basis
from vlcache_sgl.api.testing import PlainRotary
from vlcache_sgl.recall.sketch import KeySketch


@dataclass(frozen=True)
class Text:
    """A prompt's keys and the queries of its answer; `B` = layers times KV heads."""

    keys: torch.Tensor
    """`[B, n, D]`."""
    rows: torch.Tensor
    """`[B, r, D]`, queries of the answer times the scale."""
    moments: Moments
    """Of the prompt itself."""


Estimate = Callable[[Text], torch.Tensor]
"""`[B, r, n]` logits."""
Profile = Sequence[tuple[int, int]]
"""Coordinates and bits of each, the most important coordinates first."""


def exact(text: Text) -> torch.Tensor:
    """The logits themselves."""
    return text.rows @ text.keys.mT


# -- signs -------------------------------------------------------------------------------------------------------------


def signs(text: Text, centred: bool = False) -> torch.Tensor:
    """The product's sketch; `centred` by the prompt's mean key, which is kept beside it."""
    centre = text.keys.mean(1, keepdim=True) if centred else torch.zeros_like(text.keys[:, :1])
    return _signs(Text(text.keys - centre, text.rows, text.moments)) + text.rows @ centre.mT


def _signs(text: Text, turn: Turn | None = None) -> torch.Tensor:
    sketch = KeySketch(text.keys.shape[-1], "cpu") if turn is None else TurnedSketch(turn)
    found = sketch.scores(text.rows.flatten(0, 1), sketch.encode(text.keys.transpose(0, 1)))
    return found.view(*text.rows.shape[:2], -1)


def channels(text: Text) -> torch.Tensor:
    """A bit per channel: which of two means, those above and below the prompt's mean."""
    above = text.keys >= text.keys.mean(1, keepdim=True)

    def level(side: torch.Tensor) -> torch.Tensor:
        return (text.keys * side).sum(1, keepdim=True) / side.sum(1, keepdim=True).clamp(min=1)

    return text.rows @ torch.where(above, level(above), level(~above)).mT


# -- pages -------------------------------------------------------------------------------------------------------------


def _paged(text: Text, size: int) -> torch.Tensor:
    """`[B, pages, size, D]`; the last key fills the last page."""
    batch, count, dim = text.keys.shape
    rest = text.keys[:, -1:].expand(batch, -count % size, dim)
    return torch.cat([text.keys, rest], 1).view(batch, -1, size, dim)


def extremes(text: Text, size: int) -> torch.Tensor:
    """Bound by the least and greatest key of a page, by channel (Quest)."""
    pages = _paged(text, size)
    low, high = pages.amin(2), pages.amax(2)
    bound = text.rows.clamp(min=0) @ high.mT + text.rows.clamp(max=0) @ low.mT
    return bound.repeat_interleave(size, 2)[..., : text.keys.shape[1]]


def page_means(text: Text, size: int) -> torch.Tensor:
    """The mean key of a page."""
    return (text.rows @ _paged(text, size).mean(2).mT).repeat_interleave(size, 2)[..., : text.keys.shape[1]]


# -- bases -------------------------------------------------------------------------------------------------------------


@functools.cache
def levels(bits: int) -> torch.Tensor:
    """`[2^bits]` float32: where a Gaussian of unit variance is quantised with the least squared error (Lloyd, Max)."""
    drawn = torch.special.ndtri(torch.linspace(1e-5, 1 - 1e-5, 20001, dtype=torch.float64))
    found: torch.Tensor = drawn[torch.linspace(0, 20000, 2 ** (bits + 1) + 1).long()[1::2]]
    for _ in range(200):
        nearest = torch.bucketize(drawn, (found[1:] + found[:-1]) / 2)
        found = torch.zeros_like(found).scatter_add_(0, nearest, drawn) / torch.bincount(nearest, minlength=len(found))
    levels: torch.Tensor = found.float()
    return levels


def quantised(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Values of unit variance, each at its nearest level."""
    points = levels(bits)
    return points[torch.bucketize(values.contiguous(), (points[1:] + points[:-1]) / 2)]


def _quantised(keys: torch.Tensor, found: Basis, profile: Profile) -> torch.Tensor:
    """Coordinates of keys `[B, n, D]` at the levels of the profile."""
    counts, bits = zip(*profile, strict=True)
    parts = (keys @ found.keys).split(counts, dim=-1)
    return torch.cat([quantised(part, width) for part, width in zip(parts, bits, strict=True)], dim=-1)


def _size(profile: Profile) -> int:
    return sum(count for count, _ in profile)


def _principal(seen: Moments, profile: Profile) -> Basis:
    """As many coordinates as the profile has."""
    return Basis(*(part[..., : _size(profile)] for part in basis(seen, ridge=1e-4)))


def own_basis(text: Text, profile: Profile, joint: bool = True) -> torch.Tensor:
    """Coordinates of the prompt's own logits (`joint`), or of its own keys, about its mean key.

    The basis has to be kept beside the codes.
    """
    centre = text.keys.mean(1, keepdim=True)
    eye = torch.eye(text.keys.shape[-1]).expand_as(text.moments.queries)
    seen = Moments(text.moments.keys - centre.mT @ centre, text.moments.queries if joint else eye)
    found = _principal(seen, profile)
    near = _quantised(text.keys - centre, found, profile)
    return text.rows @ found.queries @ near.mT + text.rows @ centre.mT


def model_basis(text: Text, seen: Moments, profile: Profile) -> torch.Tensor:
    """Coordinates of the model's logits, `seen` in all its layers."""
    found = _principal(seen, profile)
    return text.rows @ found.queries @ _quantised(text.keys, found, profile).mT


def turned(text: Text, seen: Moments) -> torch.Tensor:
    """The server's sketch after a turn fitted to the model, `seen` in all its layers."""
    return _signs(text, balanced(seen))


def before_rotary(text: Text, profile: Profile, rotary: PlainRotary) -> torch.Tensor:
    """A basis of the prompt's keys before the rotary embedding; keys are made again, and rotated, to be scored."""
    positions = torch.arange(text.keys.shape[1])
    plain = rotary.rotate(text.keys, positions, inverse=True)
    centre = plain.mean(1, keepdim=True)
    eye = torch.eye(plain.shape[-1]).expand_as(text.moments.keys)
    found = _principal(Moments((plain - centre).mT @ (plain - centre) / plain.shape[1], eye), profile)
    near = _quantised(plain - centre, found, profile)
    return text.rows @ rotary.rotate(near @ found.queries.mT + centre, positions).mT
