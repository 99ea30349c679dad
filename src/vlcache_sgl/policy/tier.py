"""The kept set of a copy for everybody: a query-agnostic choice, and first of all what questions needed.

The copy's budget is divided over the layers by the share policy's allocator: with a profile, layers that later
questions read get it all (`docs/sharing.md`).  Within a layer, tokens go in this order: text, what the present question
needs, what the copy before this one held, the rest by the query-agnostic score.  Text before and between pictures
always stays, in addition to the budget; the question behind them is its own request's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from vlcache_sgl.api import Budget, BudgetSum, LayerView, Needs, Prompt
from vlcache_sgl.policy import Policy, PolicyError
from vlcache_sgl.policy.checks import needs_of
from vlcache_sgl.policy.plan import EvictionPlan


@dataclass(frozen=True)
class NeedsFirst:
    """A scorer that ranks: needed tokens in front, the others by another scorer's scores."""

    inner: Any
    """A query-agnostic scorer."""
    needed: torch.Tensor
    """`[L, m]` float32, whole numbers, higher = keep before those with a lower one."""
    query_aware: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return needs_of(self.inner)

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        scores: torch.Tensor = self.inner.score(layer, prompt)
        # One order for all heads, so that the whole numbers are not averaged away.
        order = scores.float().mean(0).argsort(stable=True)
        rank = torch.empty_like(order, dtype=torch.float32)
        rank[order] = torch.arange(order.numel(), device=order.device) / max(1, order.numel())
        return (self.needed[layer.index] + rank).expand(scores.shape[0], -1)


def require_agnostic(policy: Policy) -> None:
    """Whether `policy` can make a copy for everybody.

    Raises:
        PolicyError: it looks at the question, or at attention, which is not collected for it.
    """
    if policy.scorer.query_aware:
        raise PolicyError(f"scorer {policy.scorer_name} looks at the question; a copy for all questions must not")
    for need in policy.needs:
        if need.rows.kind != "none" or need.rotary:
            raise PolicyError(f"scorer {policy.scorer_name} needs more than keys and values")


def layer_weights(policy: Policy, model: Prompt, share: float) -> tuple[float, ...]:
    """What each layer gets of a copy's budget, sum 1: also what a layer is worth to the guard."""
    tokens = 1000
    prompt = replace(model, length=tokens)
    views = [
        LayerView(index=layer, scores=torch.zeros(model.num_kv_heads, tokens)) for layer in range(model.num_layers)
    ]
    budget = Budget(round(share * tokens * model.num_layers), model.num_layers, 0, tokens)
    counts = policy.allocator.allocate(views, prompt, budget).tolist()
    return tuple(count / max(1, sum(counts)) for count in counts)


def copy_policy(policy: Policy, prompt: Prompt, needed: torch.Tensor, inherited: torch.Tensor | None) -> Policy:
    """The policy that chooses a copy of the stretch `prompt`.

    Args:
        policy: the share policy.
        needed: `[L, m]` bool, what the present question needs.
        inherited: `[L, m]` bool, what the copy before this one held.
    """
    text = (~prompt.is_vision()).float()
    order = 4 * text + 2 * needed.float()
    if inherited is not None:
        order = order + inherited.float()
    return replace(
        policy,
        scorer=NeedsFirst(policy.scorer, order),
        allocator=TextInAddition(policy.allocator, int(prompt.owned - prompt.owned_vision)),
        selection=replace(policy.selection, floor=0.0, sink=0, recent=0.0),
    )


def copy_total(prompt: Prompt, share: float) -> int:
    """Tokens that a copy of the stretch `prompt` keeps, summed over layers: all text, and `share` of the pictures."""
    vision = prompt.owned_vision
    return prompt.num_layers * (prompt.owned - vision) + round(share * vision * prompt.num_layers)


@dataclass(frozen=True)
class TextInAddition:
    """An allocator that divides what is left when every layer has its text."""

    inner: Any
    text: int
    """Tokens of text."""

    @property
    def budget_sum(self) -> BudgetSum:
        """That of the inner one."""
        found: BudgetSum = getattr(self.inner, "budget_sum", "exact")
        return found

    def allocate(self, layers: Any, prompt: Prompt, budget: Budget) -> torch.Tensor:
        rest = Budget(budget.total - self.text * budget.num_layers, budget.num_layers, 0, budget.hi - self.text)
        counts: torch.Tensor = self.inner.allocate(layers, prompt, rest)
        return counts + self.text


def joined(copy: EvictionPlan, tail: torch.Tensor) -> EvictionPlan:
    """A plan for a whole prompt: the copy's stretch, then the rest.

    Args:
        tail: `[L, G, t]` bool, what stays behind the stretch.
    """
    groups = max(copy.keep.shape[1], tail.shape[1])
    keep = torch.cat([copy.keep.expand(-1, groups, -1), tail.expand(-1, groups, -1)], -1)
    return EvictionPlan(keep, keep.sum(-1).cpu())
