"""Which evicted tokens come back at a decode step, by rules that a server could follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from vlcache_sgl.recall.sketch import KeySketch

from .network import States

Among = Literal["layer", "head"]
"""Whether a layer's KV heads fetch the same tokens or each its own."""
Rank = Literal["mass", "peak", "logit"]
"""What tokens are ranked by, over the query heads that share the choice: the sum of their estimated attention
probabilities, the largest of them, or the largest estimated logit."""
Beside = Literal["prompt", "kept", "evicted"]
"""What a probability is normalised over: all the prompt by the sketch, the evicted tokens by the sketch and the kept
ones exactly, or the evicted tokens alone."""


@dataclass(frozen=True)
class Rule:
    """How evicted tokens are chosen."""

    tokens: int
    """Per layer and step, or per KV head and step."""
    among: Among = "layer"
    rank: Rank = "mass"
    beside: Beside = "prompt"
    exact: bool = False
    """Rank by the keys themselves: what no sketch can better."""
    threshold: float = 0.0
    """A layer fetches nothing while the largest share of attention that any of its heads misses, by the sketch, is
    below it."""

    @property
    def name(self) -> str:
        """Short and unique: ``64``, ``64 head peak``."""
        parts = [str(self.tokens)]
        parts += [
            str(value)
            for name, value in vars(self).items()
            if name not in ("tokens", "exact", "threshold") and value != getattr(DEFAULT, name)
        ]
        parts += ["exact"] * self.exact
        parts += [f"over {self.threshold:g}"] if self.threshold else []
        return " ".join(parts)

    def with_tokens(self, tokens: int) -> Rule:
        """The same with another number of tokens."""
        return replace(self, tokens=tokens)


DEFAULT = Rule(0)


class Recalling:
    """A rule at work on one prompt, for some conditions at once.

    Args:
        states: of the prompt.
        keep: `[L, C, K, n]` bool, what each condition kept.
        rule: all conditions'.
        tokens: of each condition, instead of the rule's.

    Attributes:
        chosen: per layer `[C, t, most]` token numbers in falling rank, if a layer chooses and `remember` was asked for.
    """

    def __init__(
        self, states: States, keep: torch.Tensor, rule: Rule, tokens: Sequence[int], remember: bool = False
    ) -> None:
        self._rule = rule
        self._keep = keep
        self._keys = states.keys
        self._tokens = torch.tensor(tokens)
        self._most = min(int(self._tokens.max()), states.length)
        self._sketch = KeySketch(states.keys.shape[-1], "cpu")
        self._codes = [self._sketch.encode(keys.transpose(0, 1)) for keys in states.keys]
        self._remember = remember
        self.chosen: list[torch.Tensor] = []
        self._needy: list[torch.Tensor] = []

    def __call__(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """See `network.Recall`."""
        rule = self._rule
        kept = self._keep[layer].transpose(0, 1)  # [K, C, n]
        logits = self._logits(layer, rows)
        shares = self._shares(layer, rows, logits, kept)
        hidden = kept[:, :, None, None]
        by_head = logits.masked_fill(hidden, -torch.inf) if rule.rank == "logit" else shares
        by_head = by_head.sum(2) if rule.rank == "mass" else by_head.amax(2)  # [K, C, t, n]
        candidates = ~kept[:, :, None]
        if rule.among == "layer":
            by_head = by_head.sum(0, keepdim=True) if rule.rank == "mass" else by_head.amax(0, keepdim=True)
            candidates = candidates.any(0, keepdim=True)
        best = by_head.masked_fill(~candidates, -torch.inf).topk(self._most, dim=-1).indices
        wanted = torch.arange(self._most) < self._tokens[:, None, None]  # [C, 1, most]
        missing = shares.sum(-1).amax((0, 2))  # [C, t]
        needy = missing >= rule.threshold
        self._needy.append(needy)
        if self._remember:
            self.chosen.append(best[0])
        wanted = (wanted & needy[..., None]).expand(best.shape)
        return torch.zeros(by_head.shape, dtype=torch.bool).scatter_(-1, best, wanted)

    @property
    def fetched(self) -> torch.Tensor:
        """`[C]`, layers and rows that fetched, of those that were asked, in [0, 1]."""
        return torch.stack(self._needy).float().mean((0, 2))

    def _logits(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """`[K, C, g, t, n]`, of all tokens of the prompt."""
        if self._rule.exact:
            return rows @ self._keys[layer][:, None, None].transpose(-1, -2)
        return self._sketch.scores(rows.flatten(0, 3), self._codes[layer]).view(*rows.shape[:-1], -1)

    def _shares(self, layer: int, rows: torch.Tensor, logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """`[K, C, g, t, n]`: each head's estimated attention on evicted tokens, in [0, 1]; 0 for the kept ones."""
        kept = kept[:, :, None, None]
        if self._rule.beside == "kept":
            logits = torch.where(kept, rows @ self._keys[layer][:, None, None].transpose(-1, -2), logits)
        elif self._rule.beside == "evicted":
            logits = logits.masked_fill(kept, -torch.inf)
        # Where nothing is evicted all logits may be masked.
        return logits.softmax(-1).nan_to_num_(0.0).masked_fill_(kept, 0.0)
