"""Text as images for the vision checkpoint of models/smollm2: one cell of 28 x 28 pixels per token of the text.

A cell is exactly one image token of Qwen2.5-VL (patch 14, merge 2), and shows the token's own text.  An image is a line
of cells, one row high: its image tokens are the tokens of the text, in reading order.

A page of several rows would need positions `row * columns + column` to be read in that order.  M-RoPE turns each rotary
frequency by one coordinate, time, row or column, and by no sum of them, whatever `mrope_section` says.  With all
frequencies on the column, the tokens of one row have the positions of text, and the row below would have them again.
So a text is several lines, each an image; what follows a line continues behind its last column.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

from PIL import Image, ImageDraw, ImageFont

CELL = 28
"""Side of a cell in pixels."""
MAX_CELLS = 199
"""Cells of a line: Qwen's image processors refuse what is more than 200 times as wide as high."""
MIN_CELLS = 4
"""Cells of a line: SGLang enlarges images of fewer pixels."""
_GRIDS = ((2, 1, 20), (6, 2, 14), (12, 3, 11), (20, 4, 9))
"""Characters that fit, rows they are written in, and font size in pixels: the first row of this table that fits."""
_VISIBLE = str.maketrans({" ": "·", "\n": "»"})


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


def draw_text(text: str, tokenizer: Tokenizer) -> list[Image.Image]:
    """The text as line images, in reading order: those of `split_text`."""
    return [draw_line([tokenizer.decode([token]) for token in line]) for line in split_text(text, tokenizer)]


def split_text(text: str, tokenizer: Tokenizer) -> list[list[int]]:
    """The text's tokens as lines, in reading order.

    Lines end at an empty line of the text if they can, otherwise at the end of a line, otherwise anywhere.  What is
    between two images in a prompt, the end of one and the start of the next, stands for the newlines where they were
    split: they are not drawn.
    """
    tokens = tokenizer.encode(text, add_special_tokens=False)
    newline = [not tokenizer.decode([token]).strip("\n") for token in tokens]
    lines = []
    start = 0
    while start < len(tokens):
        end = _line_end(newline, start)
        lines.append(tokens[start:end])
        start = end
        while start < len(tokens) and newline[start]:
            start += 1
    return lines


def _line_end(newline: Sequence[bool], start: int) -> int:
    """Where the line that begins at `start` ends (exclusive): at the last good place within MAX_CELLS.

    What would be left for the next line is never less than MIN_CELLS.
    """
    left = len(newline) - start
    if left <= MAX_CELLS:
        return len(newline)
    last = start + min(MAX_CELLS, left - MIN_CELLS)
    places = range(last, start + MIN_CELLS - 1, -1)
    empty_lines = (i for i in places if newline[i] and newline[i + 1])
    line_ends = (i for i in places if newline[i])
    return next(empty_lines, next(line_ends, last))


def draw_line(texts: Sequence[str]) -> Image.Image:
    """One row of cells: an image `len(texts) * CELL` wide and CELL high, in pixels."""
    if not MIN_CELLS <= len(texts) <= MAX_CELLS:
        raise ValueError(f"a line has {MIN_CELLS} to {MAX_CELLS} cells, not {len(texts)}")
    image = Image.new("RGB", (CELL * len(texts), CELL), "white")
    for column, text in enumerate(texts):
        image.paste(draw_cell(text), (CELL * column, 0))
    return image


@functools.cache
def draw_cell(text: str) -> Image.Image:
    """One cell, grey levels; spaces and newlines are drawn as signs, and what is longer than 20 characters is cut."""
    shown = text.translate(_VISIBLE)[: _GRIDS[-1][0]]
    image = Image.new("L", (CELL, CELL), 255)
    draw = ImageDraw.Draw(image)
    fits, rows, size = next(grid for grid in _GRIDS if len(shown) <= grid[0])
    columns = fits // rows
    for place, character in enumerate(shown):
        row, column = divmod(place, columns)
        # Every character has its own field, so that no two texts of one length differ by a shift alone.
        middle = ((column + 0.5) * CELL / columns, (row + 0.5) * CELL / rows)
        draw.text(middle, character, fill=0, font=_font(size), anchor="mm")
    return image


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's embedded font: the same everywhere, no file needed."""
    return ImageFont.load_default(size=size)
