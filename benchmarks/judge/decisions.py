"""What the product's policies keep of a prompt that the network has read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from vlcache_sgl.api import LayerView, Needs, Prompt, Span
from vlcache_sgl.api.testing import Layer, view_layers
from vlcache_sgl.config import KVBudget
from vlcache_sgl.policy.policy import Policy
from vlcache_sgl.scoring.scoring import Scoring
from vlcache_sgl.weights import ModelWeights

from .network import Network, States

Medium = Literal["text", "image"]
"""How a text reaches the model: as text, or as an image whose tokens have the text's embeddings and positions."""
REPEAT = "repeat"
"""Kind of rows that a second reading of the prompt computes."""

Views = tuple[list[LayerView], list[LayerView]]


@dataclass(frozen=True)
class Kept:
    """The decision of a policy at a budget."""

    cells: torch.Tensor
    """`[L, K, n]` bool, of the whole prompt."""
    share: float
    """Kept cells of those that could go, in [0, 1]."""
    end: int
    """Tokens from here on were computed over what was kept, those before it over everything."""


class BudgetError(AssertionError):
    """A policy kept other than its budget: its answers would be compared with those of another budget."""


def reads_twice(policy: Policy) -> bool:
    """Whether the prompt's prefix is read a second time and compressed before the rest of the prompt is computed."""
    return any(need.rows.kind == REPEAT for need in policy.needs)


def first_owned(vision: tuple[Span, ...]) -> int:
    """What stands in front of the first vision token is shared by all images and stays."""
    return vision[0].begin if vision else 0


class Decisions:
    """Decisions about one prompt in one medium; policies with the same needs share their views.

    Args:
        network: where the states come from.
        tokens: the prompt.
        states: its states.
        lines: where the text's lines lie in it.
        medium: how they are declared to the policies.
        instruction: what a second reading begins with, in front of the prompt's own tokens.
        weights: what the network's layers and heads need, for policies that ask; None: not known.
    """

    def __init__(
        self,
        network: Network,
        tokens: tuple[int, ...],
        states: States,
        lines: tuple[Span, ...],
        medium: Medium,
        instruction: tuple[int, ...],
        weights: ModelWeights | None = None,
    ) -> None:
        self._network, self._tokens, self._states, self._instruction = network, tokens, states, instruction
        vision = lines if medium == "image" else ()
        shape = network.shape
        start = first_owned(vision)
        self.prompt = Prompt(
            length=states.length,
            start=start,
            vision=vision,
            num_layers=shape.layers,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rotary=network.rotary,
            positions=torch.arange(start, states.length),
            layer_weights=() if weights is None else weights.layers,
            head_weights=() if weights is None else weights.heads,
        )
        self._scores: dict[tuple[str, int], tuple[torch.Tensor, list[LayerView]]] = {}
        self._views: dict[tuple[Needs, Needs], Views] = {}

    def keep(self, policy: Policy, budget: float) -> Kept:
        """What the policy keeps.

        Raises:
            BudgetError: it kept more or less than the budget, without being one that may.
        """
        whole = self.prompt
        # A prefix that is read twice ends with the last image, or with all but the last token.  It is compressed before
        # the request goes on with the rest, which stays.
        prompt = replace(whole, length=self._prefix_end()) if reads_twice(policy) else whole
        key = (f"{policy.scorer_name} {policy.scorer} {policy.needs}", prompt.length)
        if key not in self._scores:
            scorer, allocator = self._views_for(policy.needs, prompt)
            self._scores[key] = (policy.score(scorer, prompt), allocator)
        scores, views = self._scores[key]
        total = KVBudget(fraction=budget).target(prompt.owned, prompt.length, prompt.num_layers)
        plan = policy.plan(scores, views, prompt, total)
        cells = torch.ones(whole.num_layers, whole.num_kv_heads, whole.length, dtype=torch.bool)
        cells[..., prompt.start : prompt.length] = plan.keep
        owned = cells[..., prompt.start : prompt.length]
        kept = int(owned.sum())
        exact = getattr(policy.allocator, "budget_sum", "exact") == "exact"
        if exact and kept != total * prompt.num_kv_heads:
            raise BudgetError(f"{policy.spec} kept {kept} cells, {budget:g} is {total * prompt.num_kv_heads}")
        return Kept(cells, kept / owned.numel(), prompt.length)

    def _prefix_end(self) -> int:
        return self.prompt.vision[-1].end if self.prompt.vision else self.prompt.length - 1

    def _views_for(self, needs: tuple[Needs, Needs], prompt: Prompt) -> Views:
        if needs not in self._views:
            again = any(need.rows.kind == REPEAT for need in needs)
            self._views[needs] = self._repeated(needs, prompt) if again else self._observed(needs)
        return self._views[needs]

    def _observed(self, needs: tuple[Needs, Needs]) -> Views:
        """As the server does it, the prompt in one chunk."""
        start, length = self.prompt.start, self.prompt.length
        scoring = Scoring(self.prompt, needs)
        queries, keys, values = (part.transpose(1, 2) for part in self._states)  # [L, n, heads, D]
        if scoring.rows_in(start, length):
            scale = self.prompt.head_dim**-0.5
            for layer in range(self.prompt.num_layers):
                prefix, owned = keys[layer].split([start, length - start])
                scoring.observe(layer, 0, queries[layer], owned, prefix if start else None, None, scale)
        return scoring.views(lambda layer: torch.stack([keys[layer, start:], values[layer, start:]], dim=1))

    def _repeated(self, needs: tuple[Needs, Needs], prompt: Prompt) -> Views:
        """With the rows of a second reading of the prefix, which is dropped afterwards."""
        again = (*self._instruction, *self._tokens[prompt.start : prompt.length])
        prefix = self._states.first(prompt.length)
        _, second = self._network.read(again, prefix)
        both = (torch.cat(parts, 2) for parts in zip(prefix, second, strict=True))
        layers = [Layer(*parts) for parts in zip(*both, strict=True)]
        prompt = replace(prompt, repeated=len(again))
        scorer, allocator = (view_layers(layers, prompt, need) for need in needs)
        return scorer, allocator
