"""Ranks hold different KV heads but must keep the same tokens: heads are put together before anything is decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from vlcache_sgl.api import LayerView, Needs, Prompt
from vlcache_sgl.policy.plan import PolicyFault

if TYPE_CHECKING:
    from vlcache_sgl.policy import Policy
    from vlcache_sgl.policy.plan import EvictionPlan

_PER_HEAD = ("column_sum", "column_square_sum", "column_max", "density", "entropy", "probabilities")
"""Fields of a LayerView that are gathered over ranks; keys, values and queries stay with their rank."""


class HeadGather:
    """The tensor-parallel ranks of one model; with one rank it does nothing.

    Args:
        group: SGLang's group coordinator, or None for a single rank.
        rank, size: of this process in the group.
    """

    def __init__(self, group: Any | None, rank: int, size: int) -> None:
        self._group = group
        self._rank = rank
        self._size = size

    def decide(
        self,
        policy: Policy,
        scorer_views: Sequence[LayerView],
        allocator_views: Sequence[LayerView],
        prompt: Prompt,
        total: int,
    ) -> EvictionPlan:
        """`Policy.decide` on all ranks' heads; every rank gets the same plan."""
        if self._size == 1 or self._group is None:
            return policy.decide(scorer_views, allocator_views, prompt, total)
        # Policies see the own heads first, then everybody's: a rank's prompt has fewer KV heads.
        local = self._local(prompt)
        failure: Exception | None = None
        try:
            scores = policy.score(scorer_views, local)
        except Exception as error:
            # The other ranks are waiting in the gather: tell them with NaN, which every rank then refuses.
            failure = error
            shape = (prompt.num_layers, local.num_kv_heads, prompt.owned)
            scores = torch.full(shape, torch.nan, device=prompt.device)
        packed = [scores.transpose(0, 1)]
        names: list[tuple[int, str]] = []
        for number, view in enumerate(allocator_views):
            for name in _PER_HEAD:
                value = getattr(view, name)
                if value is not None:
                    names.append((number, name))
                    packed.append(value.to(torch.float32))
        everyone, *rest = self._gather(packed)
        if failure is not None:
            raise failure
        if bool(everyone.isnan().any()):
            raise PolicyFault("the scorer failed on another rank")
        for (number, name), value in zip(names, rest, strict=True):
            setattr(allocator_views[number], name, value)
        together = replace(prompt, num_kv_heads=everyone.shape[0])
        return policy.plan(everyone.transpose(0, 1), allocator_views, together, total)

    def refuse(self, prompt: Prompt, needs: Needs, rows: int) -> None:
        """Instead of `decide` on a rank that has nothing to decide with: the others wait for it in their gather.

        They see NaN and leave the request whole, too.

        Args:
            needs: what the allocator declares.
            rows: how many query rows it has.
        """
        if self._size == 1 or self._group is None:
            return
        local = self._local(prompt)
        per_head = {
            "column_sum": prompt.owned * needs.column_sum,
            "column_square_sum": prompt.owned * needs.column_square_sum,
            "column_max": prompt.owned * needs.column_max,
            "density": int(needs.density is not None),
            "entropy": int(needs.entropy),
            "probabilities": prompt.num_heads // prompt.num_kv_heads * rows * prompt.owned * needs.probabilities,
        }
        assert tuple(per_head) == _PER_HEAD
        per_layer = local.num_kv_heads * (prompt.owned + (sum(per_head.values()) if rows else 0))
        self._gather([torch.full((prompt.num_layers * per_layer,), torch.nan, device=prompt.device)])

    def _local(self, prompt: Prompt) -> Prompt:
        """The prompt as this rank's heads see it."""
        return replace(prompt, num_kv_heads=max(1, prompt.num_kv_heads // self._size))

    def _gather(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Concatenates each tensor over ranks along its first dimension (heads), in one collective."""
        assert self._group is not None
        flat = torch.cat([t.reshape(-1) for t in tensors])
        everyone = self._group.all_gather(flat, dim=0).view(self._size, -1)
        out = []
        first = 0
        for tensor in tensors:
            count = tensor.numel()
            parts = everyone[:, first : first + count]
            out.append(parts.reshape(self._size * tensor.shape[0], *tensor.shape[1:]))
            first += count
        return out

    def own_groups(self, keep: torch.Tensor, groups: int) -> torch.Tensor:
        """This rank's part of `keep` `[L, G_all, m]`: all of it when heads share a set (`G_all` = 1)."""
        if keep.shape[1] == 1 or self._size == 1:
            return keep
        return keep[:, self._rank * groups : (self._rank + 1) * groups]


assert set(_PER_HEAD) <= {f.name for f in fields(LayerView)}
