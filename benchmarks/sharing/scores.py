"""Scores for copies that no server makes: what made-up questions look at and, as a bound, what the real ones do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.sharing.recorder import Recorder
from vlcache_sgl.api import LayerView, Needs, Prompt
from vlcache_sgl.compression.sharing.guard import LAST_ROWS
from vlcache_sgl.evaluation.tasks.receipts import COLOUR_NAMES, LETTERS, TEMPLATES

GENERIC = (
    "Describe this image.",
    "What is in the picture?",
    "What does the picture show?",
    "Read all the text in the picture.",
    "Which details stand out?",
    "Summarise what you see.",
)
"""Questions that fit every picture."""
GUESSES = 32

Reduce = Callable[[Tensor], Tensor]
"""`[K, g, t, prefix]`, attention of a question's `t` rows by the `g` query heads of each KV head -> `[K, prefix]`."""


def over_rows(weights: Tensor) -> Tensor:
    """Mean over rows and heads."""
    return weights.mean((1, 2))


def any_row(weights: Tensor) -> Tensor:
    """Maximum over rows and heads."""
    return weights.amax((1, 2))


def last_rows(weights: Tensor) -> Tensor:
    """Mean over heads and the last rows, which are those that look for the answer."""
    return weights[:, :, -LAST_ROWS:].mean((1, 2))


@dataclass(frozen=True, eq=False)
class Told:
    """A scorer that was told its scores."""

    scores: Sequence[Tensor]
    """Per layer, `[K, m]`."""
    rows: int
    """Of the forward that they come from."""
    needs: ClassVar[Needs] = Needs()
    query_aware: ClassVar[bool] = False

    def score(self, layer: LayerView, prompt: Prompt) -> Tensor:
        return self.scores[layer.index]


def guesses(seed: int) -> dict[tuple[str, str], str]:
    """Questions of the kind that the task asks, by colour and letter of labels drawn at random."""
    rng = random.Random(seed)
    labels = rng.sample(list(itertools.product(COLOUR_NAMES, LETTERS)), GUESSES)
    return {(colour, letter): rng.choice(TEMPLATES).format(colour=colour, letter=letter) for colour, letter in labels}


def looked_at(model: Recorder, texts: Sequence[str], reduce: Reduce) -> Told:
    """What of the prefix any of the questions `texts` looks at, from one forward of all of them behind it."""
    rows = [model.tokens(text) for text in texts]
    model.ask(rows)
    scores = []
    for seen in model.seen:
        by_head = seen.weights[..., : model.span.stop].unflatten(1, (seen.keys.shape[2], -1))
        scores.append(torch.stack([reduce(w[:, :, : len(r)]) for w, r in zip(by_head, rows, strict=True)]).amax(0))
    return Told(scores, sum(map(len, rows)))
