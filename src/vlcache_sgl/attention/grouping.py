"""Shapes that GPU kernels see when KV heads have cells of their own.

Kernels know sequences with a number of heads.  With a cell per KV head, every (plane, request) is a sequence of its
own, number ``g * B + b``, with the query heads of that KV head.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def split_groups(x: torch.Tensor, groups: int) -> torch.Tensor:
    """`[T, H, D]` -> `[G * T, H / G, D]`; with one group `x` itself."""
    if groups == 1:
        return x
    tokens, heads, dim = x.shape
    return x.reshape(tokens, groups, heads // groups, dim).transpose(0, 1).reshape(-1, heads // groups, dim)


def join_groups(x: torch.Tensor, groups: int) -> torch.Tensor:
    """`[G * T, H / G, D]` -> `[T, H, D]`: the reverse of `split_groups`."""
    if groups == 1:
        return x
    _, heads, dim = x.shape
    return x.view(groups, -1, heads, dim).transpose(0, 1).reshape(-1, groups * heads, dim)


def join_lse(lse: torch.Tensor | None, groups: int) -> torch.Tensor | None:
    """`[G * T, H / G]` -> `[T, H]`."""
    return None if lse is None else join_groups(lse.unsqueeze(-1), groups).squeeze(-1)


def with_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """`x` `[T, H, D]` with zeros up to `rows` rows: batches may be padded."""
    return x if x.shape[0] == rows else pad(x, (0, 0, 0, 0, 0, rows - x.shape[0]))
