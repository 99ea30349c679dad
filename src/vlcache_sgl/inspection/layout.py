"""From kept positions to places on images.  Pure: numpy and Pillow only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float64]

MAX_PIXELS = 720
"""Longer side of a drawn image."""
_VEIL_COLOUR = (173, 181, 189)
"""Grey, not white: on a scanned page what is kept must stand out from what is veiled."""
_VEIL = 0.8
"""How much of the veil's colour covers what is evicted."""


@dataclass(frozen=True)
class Look:
    """One grid of tokens over one image: an image has one, LLaVA's have an overview and tiles."""

    item: int
    """Which image."""
    title: str
    first: int
    """Position of the grid's first token."""
    rows: int
    columns: int
    newlines: bool
    fit: str

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """`[rows, columns]`, the prompt position of every place."""
        step = self.columns + self.newlines
        return self.first + np.arange(self.rows)[:, None] * step + np.arange(self.columns)[None, :]


@dataclass(frozen=True)
class Inspection:
    """Everything there is to see of one request."""

    images: tuple[Image.Image, ...]
    question: str
    policy: str
    budget: str
    full_answer: str
    """With the full cache."""
    answer: str
    """With the compressed one."""
    model: str
    kept: Mask
    """`[layers, prompt tokens]`: which tokens each layer keeps."""
    vision: tuple[tuple[int, int], ...]
    """Begin and end of the runs of vision tokens, ascending."""
    looks: tuple[Look, ...]
    attention: tuple[float, ...] = ()
    """Per layer the share, in [0, 1], of the full cache's attention while it answered that falls on what is kept; empty
    where the server cannot measure it."""
    numbers: tuple[int, ...] = ()
    """Of the layers in the model, where they are not 0, 1, 2, ...: of a hybrid those with a KV cache."""

    def number(self, layer: int) -> int:
        """What the model calls a row of `kept`."""
        return self.numbers[layer] if self.numbers else layer

    @property
    def layers(self) -> int:
        return int(self.kept.shape[0])

    @property
    def ratio(self) -> float:
        """Kept share of all tokens in all layers."""
        return float(self.kept.mean())

    @property
    def is_vision(self) -> Mask:
        """`[prompt tokens]`."""
        mask = np.zeros(self.kept.shape[1], dtype=bool)
        for begin, end in self.vision:
            mask[begin:end] = True
        return mask

    def look(self, look: Look, layer: int) -> Mask:
        """`[rows, columns]`: what `layer` keeps there."""
        found: Mask = self.kept[layer][look.positions]
        return found

    def layers_keeping(self, look: Look) -> Numbers:
        """`[rows, columns]`: share of the layers that keep a place."""
        return np.asarray(self.kept[:, look.positions].mean(0), dtype=np.float64)


def kept_mask(report: Mapping[str, Any]) -> Mask:
    """`[layers, prompt tokens]` from a server's report with positions.

    Raises:
        ValueError: when there are none.
    """
    if "kept_positions" not in report:
        raise ValueError(f"nothing was compressed: {report.get('skipped') or report.get('failed') or 'no report'}")
    # A follow-up's report has no length: its own text is whole and ends the prompt.
    length = max(
        int(report.get("prompt_tokens", 0)), *(max(layer, default=-1) + 1 for layer in report["kept_positions"])
    )
    kept = np.zeros((len(report["kept_positions"]), length), dtype=bool)
    for layer, positions in zip(kept, report["kept_positions"], strict=True):
        layer[positions] = True
    return kept


def read_report(
    report: Mapping[str, Any],
    images: Sequence[Image.Image],
    question: str,
    answers: tuple[str, str],
    policy: str,
    budget: str,
    model: str,
    attention: Sequence[float] = (),
    numbers: Sequence[int] = (),
) -> Inspection:
    """An inspection from a server's report with positions.

    Args:
        answers: with the full cache, with the compressed one.
        attention, numbers: as in `Inspection`.

    Raises:
        ValueError: when the prompt was not compressed, or the server does not know how its tokens lie on the images.
    """
    kept = kept_mask(report)
    looks = []
    for run in report["vision"]:
        first = run["begin"]
        for number, grid in enumerate(run["grids"]):
            name = ("overview", "tiles")[number] if len(run["grids"]) == 2 else "image"
            title = f"{name} {run['item'] + 1}" if len(images) > 1 else name
            rows, columns, newlines = grid["rows"], grid["columns"], grid["newlines"]
            looks.append(Look(run["item"], title, first, rows, columns, newlines, grid["fit"]))
            first += rows * (columns + newlines)
    if not looks:
        raise ValueError("the server does not know how this model's vision tokens lie on an image")
    return Inspection(
        images=tuple(shrunk(image) for image in images),
        question=question,
        policy=policy,
        budget=budget,
        full_answer=answers[0],
        answer=answers[1],
        model=model,
        kept=kept,
        vision=tuple((run["begin"], run["end"]) for run in report["vision"]),
        looks=tuple(looks),
        attention=tuple(attention),
        numbers=tuple(numbers),
    )


def shrunk(image: Image.Image) -> Image.Image:
    """RGB, at most MAX_PIXELS wide and high."""
    copy = image.convert("RGB")
    copy.thumbnail((MAX_PIXELS, MAX_PIXELS), Image.Resampling.LANCZOS)
    return copy


def places(look: Look, width: int, height: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row of each pixel line `[height]` and column of each pixel column `[width]` of an image.

    >>> look = Look(0, "", 0, rows=2, columns=2, newlines=False, fit="pad")
    >>> [axis.tolist() for axis in places(look, 4, 2)]  # the square around it is 4 x 4: its lines are the middle ones
    [[0, 1], [0, 0, 1, 1]]
    """
    square = max(width, height)
    high, wide = (square, square) if look.fit == "pad" else (height, width)
    lines = (np.arange(height) + 0.5 + (high - height) / 2) / high * look.rows
    columns = (np.arange(width) + 0.5 + (wide - width) / 2) / wide * look.columns
    return lines.astype(np.int64), columns.astype(np.int64)


def overlay(image: Image.Image, look: Look, kept: Mask) -> Image.Image:
    """The image with everything veiled that is not kept, `[rows, columns]` of its grid."""
    lines, columns = places(look, image.width, image.height)
    shown = kept[lines[:, None], columns[None, :]]
    pixels = np.asarray(image, dtype=np.float64)
    grey = pixels.mean(-1, keepdims=True).repeat(3, -1)
    veiled = grey * (1 - _VEIL) + np.array(_VEIL_COLOUR) * _VEIL
    return Image.fromarray(np.where(shown[..., None], pixels, veiled).astype(np.uint8))
