"""Training batches: a bank of drawn cells, and images with several questions each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlcache_sgl.evaluation.tasks import receipts

from .schedule import BOOTSTRAP

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
PATCH = 14
PATCHES_PER_CELL = 4
PATCH_VALUES = 3 * PATCH * PATCH
ANSWER_TOKENS = receipts.CODE_LENGTH + 1
"""The code and the end of the turn."""


def draw_bank(variants: int, seed: int) -> Tensor:
    """Every glyph drawn `variants` times: float32 `[NUM_GLYPHS, variants, PATCHES_PER_CELL, PATCH_VALUES]`.

    Patches are normalised and ordered as the stock image processor does it: a cell is one 2 x 2 merge block.
    """
    rng = np.random.default_rng(seed)
    pixels = np.stack([receipts.draw_cell(rng, g) for g in range(receipts.NUM_GLYPHS) for _ in range(variants)])
    values = (pixels.astype(np.float32) / 255.0 - np.asarray(IMAGE_MEAN, np.float32)) / np.asarray(
        IMAGE_STD, np.float32
    )
    patches = values.reshape(-1, 2, PATCH, 2, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
    shape = (receipts.NUM_GLYPHS, variants, PATCHES_PER_CELL, PATCH_VALUES)
    return torch.from_numpy(np.ascontiguousarray(patches)).view(shape)


class Vocabulary:
    """Token ids of everything that is asked and answered; built once, because tokenizing in the loop would dominate it.

    All questions of one template have the same number of tokens, so a batch uses one template and needs no padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        def ids(text: str) -> list[int]:
            return list(tokenizer(text)["input_ids"])

        self.prefix = torch.tensor(ids("<|im_start|>user\n<|vision_start|>"))
        """`[prefix tokens]`: what precedes the image tokens."""
        records = [receipts.Record(label, (), 0, 0) for label in range(receipts.NUM_LABELS)]
        turn = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
        tails = [[ids(turn.format(r.question(t))) for r in records] for t in range(len(receipts.TEMPLATES))]
        tails.insert(BOOTSTRAP, [ids(f"<|vision_end|>{r.colour} {r.letter}") for r in records])
        self.tails = [torch.tensor(rows) for rows in tails]
        """Per template `[NUM_LABELS, tail tokens]`: what follows the image tokens."""
        self.label_words = [(t != t[:1]).any(0).nonzero()[:, 0].tolist() for t in self.tails]
        """Per template, the places in the tail of the colour and the letter."""
        self.grounded_rows = [
            list(range(words[-1] + 1, tail.shape[1] - 1))
            for words, tail in zip(self.label_words, self.tails, strict=True)
        ]
        """Per template, the places after the label but for the last token, which is busy with the first character."""
        self.characters = torch.tensor([ids(c) for c in receipts.CODE_CHARACTERS])[:, 0]
        self.end = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))


@dataclass(frozen=True)
class Batch:
    """B images of one size with K questions each, all in one template."""

    rows: int
    cols: int
    template: int
    glyphs: Tensor
    """`[B, rows * cols]` int64 glyph numbers."""
    text: Tensor
    """`[B, K, tail + CODE_LENGTH]` int64 token ids: the question, then the code (teacher forcing)."""
    targets: Tensor
    """`[B, K, ANSWER_TOKENS]` int64 token ids."""
    record: Tensor
    """`[B, K, RECORD_LENGTH]` int64 prompt positions of the cells that answer the question."""


def draw_batch(
    rng: np.random.Generator,
    vocabulary: Vocabulary,
    *,
    images: int,
    shape: tuple[int, int],
    questions: int,
    template: int,
    fill: tuple[float, float],
) -> Batch:
    """Draw a batch; an image with fewer than `questions` records is asked about some of them again."""
    rows, cols = shape
    glyphs, labels, codes, first = [], [], [], []
    for _ in range(images):
        grid, records = receipts.sample_grid(rng, rows, cols, rng.uniform(*fill))
        chosen = [records[i] for i in np.resize(rng.permutation(len(records)), questions)]
        glyphs.append(grid)
        labels.append([r.label for r in chosen])
        codes.append([r.code for r in chosen])
        first.append([r.row * cols + r.col for r in chosen])
    answers = vocabulary.characters[torch.tensor(codes)]
    tails = vocabulary.tails[template][torch.tensor(labels)]
    ends = torch.full((images, questions, 1), vocabulary.end)
    return Batch(
        rows,
        cols,
        template,
        glyphs=torch.from_numpy(np.stack(glyphs)),
        text=torch.cat([tails, answers], -1),
        targets=torch.cat([answers, ends], -1),
        record=torch.tensor(first)[..., None] + len(vocabulary.prefix) + torch.arange(receipts.RECORD_LENGTH),
    )
