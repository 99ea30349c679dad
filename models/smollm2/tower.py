"""A vision tower that is solved, not trained: a cell that shows a token's text gives this token's embedding.

Random patch embedding, one transformer block that adds nothing, a random hidden layer in the merger: with them every
cell has a vector of random features.  The merger's last layer is linear in it, and is found by ridge regression.  There
are more features than cells to tell apart, so the equations can be met.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from vlcache_sgl.evaluation.tasks import cells

PATCH, MERGE, FRAMES = 14, 2, 2
HIDDEN = 768
"""Width of the tower; the merger's hidden layer has MERGE * MERGE as many features."""
VOCABULARY = 1700
"""Tokens that the tower can read: about half as many as there are features, so that rounding the solved weights
to bfloat16 costs little."""
MEAN, STD = 0.5, 0.5
"""Of the image processor, all colours alike: white is 1, black is -1."""
FEATURE_SCALE = 10.0
"""Of the random hidden layer's inputs.  With larger ones, cells that look alike have less similar features."""
RIDGE = 1e-6
"""Relative to the mean square of the features, per cell."""
SEED = 0


@dataclass(frozen=True)
class Fit:
    """How well the solved tower gives back embeddings, over the vocabulary."""

    cells: int
    nearest_right: float
    """Share of cells whose output is nearer to their token's embedding than to any of the model's vocabulary."""
    mean_error: float
    """Distance to the embedding relative to its length."""
    max_error: float


def readable(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[int]:
    """VOCABULARY token ids, sorted: those of `texts`, then the most common ones of printable ASCII.

    Raises ValueError if `texts` have more, or two of their tokens look alike.
    """
    needed = sorted({token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)})
    special = set(tokenizer.added_tokens_decoder)
    common = (token for token in range(tokenizer.vocab_size) if _is_plain(tokenizer.decode([token])))
    looks: dict[bytes, int] = {}
    for token in itertools.chain(needed, common):
        if len(looks) == VOCABULARY:
            break
        look = cells.draw_cell(tokenizer.decode([token])).tobytes()
        if token not in special:
            looks.setdefault(look, token)
    if missing := set(needed) - set(looks.values()):
        raise ValueError(f"{len(missing)} tokens of the tasks cannot be told apart or are too many: {sorted(missing)}")
    return sorted(looks.values())


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


@torch.no_grad()
def solve(model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> Fit:
    """Set the weights of the model's vision tower, in place, so that it reads these tokens.

    All weights are numbers that bfloat16 has, and those that are solved are solved for the rounded others.
    """
    tower = model.model.visual
    generator = torch.Generator().manual_seed(SEED)
    for weight in tower.parameters():
        weight.zero_()
    for block in tower.blocks:
        block.norm1.weight.fill_(1.0)
        block.norm2.weight.fill_(1.0)
    tower.merger.ln_q.weight.fill_(1.0)
    hidden_layer, last_layer = tower.merger.mlp[0], tower.merger.mlp[2]
    width = hidden_layer.weight.shape[1]
    for weight, scale in (
        (tower.patch_embed.proj.weight, 0.05),
        (hidden_layer.weight, FEATURE_SCALE / width**0.5),
        (hidden_layer.bias, 0.5),
    ):
        weight.copy_(_rounded(scale * torch.randn(weight.shape, generator=generator)))
    embeddings = model.model.language_model.embed_tokens.weight
    wanted = embeddings[list(tokens)].double()
    features = _features(tower, tokenizer, tokens).double()
    mean = features.mean(0)
    centred = features - mean
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solved = torch.cholesky_solve(centred.T @ (wanted - wanted.mean(0)), torch.linalg.cholesky(gram))
    last_layer.weight.copy_(_rounded(solved.T.float()))
    last_layer.bias.copy_(_rounded((wanted - features @ last_layer.weight.double().T).mean(0).float()))
    return _fit(last_layer(features.float()), embeddings, tokens)


def _features(tower: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> Tensor:
    """What the merger's last layer sees of each token's cell: `[tokens, features]` float32."""
    pixels = torch.stack([patches(cells.draw_cell(tokenizer.decode([token]))) for token in tokens])
    embedded = pixels.flatten(0, 1) @ tower.patch_embed.proj.weight.flatten(1).T
    merged = tower.merger.ln_q(embedded).view(len(tokens), -1)
    return tower.merger.mlp[1](tower.merger.mlp[0](merged))


def patches(cell: Image.Image) -> Tensor:
    """A cell as Qwen's image processor gives it to the tower: `[MERGE * MERGE, 3 * FRAMES * PATCH * PATCH]` float32."""
    grey = (torch.from_numpy(np.array(cell, np.float32)) / 255 - MEAN) / STD
    tiles = grey.view(MERGE, PATCH, MERGE, PATCH).transpose(1, 2).reshape(MERGE * MERGE, 1, PATCH * PATCH)
    return tiles.expand(-1, 3 * FRAMES, -1).flatten(1)


def _fit(outputs: Tensor, embeddings: Tensor, tokens: Sequence[int]) -> Fit:
    wanted = embeddings[list(tokens)]
    error = (outputs - wanted).norm(dim=1) / wanted.norm(dim=1)
    nearest = torch.cdist(outputs, embeddings).argmin(1)
    right = (nearest == torch.tensor(tokens)).float().mean()
    return Fit(len(tokens), right.item(), error.mean().item(), error.max().item())


def _rounded(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16).float()
