"""Before the curriculum: the vision tower learns to name what a cell shows, in the language model's own words."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlcache_sgl.evaluation.tasks.receipts import (
    CODE_CHARACTERS,
    COLOUR_NAMES,
    FIRST_LABEL,
    FIRST_MARK,
    LETTERS,
    MARKS,
    NUM_GLYPHS,
)

from .network import TrainableVLM

STEPS = 800
RATE = 2e-3
WARM_UP = 30
VARIANTS = 2
TEMPERATURE = 20.0


def align(network: TrainableVLM, tokenizer: PreTrainedTokenizerBase, bank: Tensor) -> None:
    """Train tower and token embeddings, in place, so that a cell's embedding points at the words for it (as CLIP does):
    a code character at its token, a label at those of its letter and its colour.  No head is thrown away afterwards."""
    tower, words = network.model.model.visual, network.model.model.language_model.embed_tokens.weight
    optimizer = torch.optim.AdamW([*tower.parameters(), words], lr=RATE, weight_decay=0.0)
    namings = _namings(tokenizer)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = (
            RATE * min(1, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        )
        cells = network.embed_glyphs(bank, VARIANTS).float()
        directions, names = F.normalize(cells, dim=-1), F.normalize(words, dim=-1)
        # The mean square is held at 1: what the language model's first norm expects of a token.
        loss = 0.05 * (cells.pow(2).mean(-1) - 1).pow(2).mean()
        for glyphs, tokens, target in namings:
            logits = TEMPERATURE * directions.view(NUM_GLYPHS, VARIANTS, -1)[glyphs] @ names[tokens].T
            loss = loss + F.cross_entropy(logits.flatten(0, 1), target.repeat_interleave(VARIANTS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"align {step + 1}/{STEPS}  loss {loss.item():.3f}", flush=True)
    network.model.zero_grad(set_to_none=True)


def _namings(tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Ways to name cells: (glyph numbers `[N]`, candidate token ids, index of the right one `[N]`)."""

    def tokens(names: str | tuple[str, ...], before: str = "") -> Tensor:
        return torch.tensor([tokenizer(before + name)["input_ids"] for name in names])[:, 0]

    labels = torch.arange(FIRST_LABEL, FIRST_MARK)
    marks = torch.arange(FIRST_MARK, FIRST_MARK + len(MARKS))
    characters = torch.cat([torch.arange(FIRST_LABEL), marks])
    letter, colour = (labels - FIRST_LABEL) // len(COLOUR_NAMES), (labels - FIRST_LABEL) % len(COLOUR_NAMES)
    return [
        (characters, tokens(CODE_CHARACTERS + MARKS), torch.arange(len(characters))),
        (labels, tokens(LETTERS, " "), letter),
        (labels, tokens(COLOUR_NAMES, " "), colour),
        (labels, tokens(COLOUR_NAMES), colour),
    ]
