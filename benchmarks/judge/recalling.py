"""Which evicted tokens come back at a decode step, by rules that a server could follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from benchmarks.judge.turn import Moments, TurnedSketch, balanced, moments, spread
from vlcache_sgl.evaluation.tasks.reading import make_document
from vlcache_sgl.recall.sketch import KeySketch

from .cases import CaseMaker
from .network import Network, Recalled, States

Among = Literal["layer", "head"]
"""Whether a layer's KV heads fetch the same tokens or each its own."""
Rank = Literal["mass", "peak", "logit"]
"""What tokens are ranked by, over the query heads that share the choice: the sum of their estimated attention
probabilities, the largest of them, or the largest estimated logit."""
Beside = Literal["prompt", "kept", "evicted"]
"""What a probability is normalised over: all the prompt by the sketch, the evicted tokens by the sketch and the kept
ones exactly, or the evicted tokens alone."""
SketchName = Literal["signs", "random", "text", "keys"]
"""Signs, signs after a turn that was fitted on random tokens or on a text, or the keys themselves, as a bound."""
FITTED = 1024
"""Tokens of what a turn is fitted on."""


class Sketch(Protocol):
    """Of one layer; see `KeySketch`."""

    def encode(self, keys: torch.Tensor) -> torch.Tensor: ...

    def scores(self, queries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor: ...


class Keys:
    """A sketch that is the keys."""

    def encode(self, keys: torch.Tensor) -> torch.Tensor:
        """`[n, K, D]`."""
        return keys

    def scores(self, queries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """`[H, n]`, exact."""
        by_head = queries.view(codes.shape[1], -1, codes.shape[2])
        return torch.einsum("kgd,nkd->kgn", by_head, codes).flatten(0, 1)


def layer_sketches(name: SketchName, network: Network, cases: CaseMaker) -> list[Sketch]:
    """One for each layer of the model."""
    shape = network.shape
    if name == "keys":
        return [Keys()] * shape.layers
    if name == "signs":
        return [KeySketch(shape.head_dim, "cpu")] * shape.layers
    seen = (spread(layer, network.rotary) for layer in layer_moments(name, network, cases))
    return [TurnedSketch(balanced(layer)) for layer in seen]


def layer_moments(name: SketchName, network: Network, cases: CaseMaker) -> list[Moments]:
    """Of each layer, while the model reads random tokens or a text that no question is asked about."""
    if name == "random":
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, network.vocabulary, (FITTED,), generator=generator).tolist()
    else:
        tokens = list(cases.tokens(make_document("several", FITTED, 0).text)[:FITTED])
    _, states = network.read(tokens)
    layers = zip(states.keys, states.queries, strict=True)
    return [moments(keys.transpose(0, 1), queries.transpose(0, 1)) for keys, queries in layers]


@dataclass(frozen=True)
class Rule:
    """How evicted tokens are chosen."""

    tokens: int
    """Per layer and step, or per KV head and step."""
    among: Among = "layer"
    rank: Rank = "logit"
    beside: Beside = "evicted"
    sketch: SketchName = "signs"
    threshold: float = 0.0
    """A layer fetches nothing while the share of attention that its heads miss, on average and by the sketch, is below
    it; needs `beside` other than ``evicted``, where that share is always 1."""

    rest: bool = False
    """What is neither kept nor recalled counts by the sketch: its mass, and the evicted tokens' mean value."""

    @property
    def name(self) -> str:
        """Unique: ``64 layer logit evicted signs``."""
        parts = [str(value) for name, value in vars(self).items() if name not in ("threshold", "rest")]
        parts += ["rest"] * self.rest
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
        sketches: of each layer.

    Attributes:
        chosen: per layer `[C, t, most]` token numbers in falling rank, if a layer chooses and `remember` was asked for.
    """

    def __init__(
        self,
        states: States,
        keep: torch.Tensor,
        rule: Rule,
        tokens: Sequence[int],
        sketches: Sequence[Sketch],
        remember: bool = False,
    ) -> None:
        self._rule = rule
        self._keep = keep
        self._keys, self._values = states.keys, states.values
        self._tokens = torch.tensor(tokens)
        self._most = min(int(self._tokens.max()), states.length)
        self._sketches = sketches
        layers = zip(sketches, states.keys, strict=True)
        self._codes = [sketch.encode(keys.transpose(0, 1)) for sketch, keys in layers]
        self._remember = remember
        self.chosen: list[torch.Tensor] = []
        self._needy: list[torch.Tensor] = []

    def __call__(self, layer: int, rows: torch.Tensor) -> Recalled:
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
        missing = shares.sum(-1).mean((0, 2))  # [C, t]
        needy = missing >= rule.threshold
        self._needy.append(needy)
        if self._remember:
            self.chosen.append(best[0])
        wanted = (wanted & needy[..., None]).expand(best.shape)
        back = torch.zeros(by_head.shape, dtype=torch.bool).scatter_(-1, best, wanted)
        if not rule.rest:
            return Recalled(back)
        others = logits.masked_fill(hidden | back[:, :, None], -torch.inf).logsumexp(-1, keepdim=True)
        weights = (~kept).float() / (~kept).sum(-1, keepdim=True).clamp(min=1)
        return Recalled(back, others, (weights @ self._values[layer])[:, :, None, None])

    @property
    def fetched(self) -> torch.Tensor:
        """`[C]`, layers and rows that fetched, of those that were asked, in [0, 1]."""
        return torch.stack(self._needy).float().mean((0, 2))

    def _logits(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """`[K, C, g, t, n]`, of all tokens of the prompt."""
        return self._sketches[layer].scores(rows.flatten(0, 3), self._codes[layer]).view(*rows.shape[:-1], -1)

    def _shares(self, layer: int, rows: torch.Tensor, logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """`[K, C, g, t, n]`: each head's estimated attention on evicted tokens, in [0, 1]; 0 for the kept ones."""
        kept = kept[:, :, None, None]
        if self._rule.beside == "kept":
            logits = torch.where(kept, rows @ self._keys[layer][:, None, None].transpose(-1, -2), logits)
        elif self._rule.beside == "evicted":
            logits = logits.masked_fill(kept, -torch.inf)
        # Where nothing is evicted all logits may be masked.
        return logits.softmax(-1).nan_to_num_(0.0).masked_fill_(kept, 0.0)
