"""Receipts: images of coloured letters with four-character codes beside them, and questions with known answers.

An image is a grid of 28 x 28 pixel cells, which is exactly one image token of Qwen2.5-VL (patch 14, merge 2).  Five
cells in a row form a record, a coloured letter and its code; other cells are blank or hold a mark.  "What is the code
of red K?" is answered by the code of that record, so every question needs five known image tokens and no others.

The same seed gives the same image, to the bit, wherever numpy and Pillow draw alike:

>>> image = make_receipt(seed=1000, rows=16, cols=16)
>>> [(q.text, q.answer) for q in image.questions[:1]]
[('red V?', 'YGZR')]
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

CELL = 28
"""Side of a cell in pixels: one image token of Qwen2.5-VL."""
CODE_LENGTH = 4
RECORD_LENGTH = 1 + CODE_LENGTH
"""Cells of a record: the label, then the code."""

LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
"""Label letters; I, O and Q look like 1 and 0."""
CODE_CHARACTERS = "0123456789" + LETTERS
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 25),
    "green": (20, 145, 40),
    "blue": (35, 70, 225),
    "orange": (245, 135, 10),
    "purple": (135, 35, 170),
    "brown": (120, 72, 35),
    "cyan": (10, 175, 190),
    "pink": (245, 90, 180),
}
COLOUR_NAMES = tuple(COLOURS)
MARKS = "-.*+=~"
"""Distractors that belong to no record."""
TEMPLATES = (
    "What is the code of {colour} {letter}?",
    "Read the code next to the {colour} {letter}.",
    "{colour} {letter}?",
    "Which code is printed after the {colour} letter {letter}?",
)

NUM_LABELS = len(LETTERS) * len(COLOURS)
"""A label is numbered letter * 8 + colour."""

# What a cell can hold, numbered: a code character, a label, a mark, nothing.
FIRST_LABEL = len(CODE_CHARACTERS)
FIRST_MARK = FIRST_LABEL + NUM_LABELS
BLANK = FIRST_MARK + len(MARKS)
NUM_GLYPHS = BLANK + 1

_BLACK = (20, 20, 20)
_GREY = (120, 120, 120)
_MARK_RATE = 0.15
_MAX_RECORDS = 160
_STREAM = 77
"""Last word of the random seed of a held-out image; training draws from other streams."""


@dataclass(frozen=True)
class Record:
    """One line of a receipt, as drawn."""

    label: int
    """In [0, NUM_LABELS)."""
    code: tuple[int, ...]
    """CODE_LENGTH indices into CODE_CHARACTERS."""
    row: int
    col: int
    """Cell of the label; the code follows to its right."""

    @property
    def colour(self) -> str:
        return COLOUR_NAMES[self.label % len(COLOURS)]

    @property
    def letter(self) -> str:
        return LETTERS[self.label // len(COLOURS)]

    @property
    def answer(self) -> str:
        return "".join(CODE_CHARACTERS[c] for c in self.code)

    def question(self, template: int = 0) -> str:
        """The question that this record answers, in one of the TEMPLATES."""
        return TEMPLATES[template].format(colour=self.colour, letter=self.letter)


@dataclass(frozen=True)
class Question:
    """A question about an image, its answer, and the image tokens that answer it."""

    text: str
    answer: str
    cells: tuple[int, ...]
    """RECORD_LENGTH cells, row * cols + col, in the order of the record.  As every cell is one image token and image
    tokens are row-major, `cells` are also positions in the image's run of image tokens."""
    record: Record


@dataclass(frozen=True)
class Receipt:
    """A receipt, drawn, with questions about distinct records of it."""

    image: Image.Image
    """RGB, cols * CELL wide and rows * CELL high, in pixels."""
    rows: int
    cols: int
    questions: tuple[Question, ...]

    @property
    def num_image_tokens(self) -> int:
        return self.rows * self.cols


def make_receipt(seed: int, rows: int, cols: int, num_questions: int = 4, fill: float | None = None) -> Receipt:
    """Draw a held-out image with at most `num_questions` questions (as many as it has records).

    `fill` is the expected share of the room for records that is used, in [0, 1]; left out, it is drawn from 0.4 to 1.
    Raises ValueError when no record fits.
    """
    if rows < 1 or cols < RECORD_LENGTH:
        raise ValueError(f"a record needs {RECORD_LENGTH} cells in a row, the grid has {rows} x {cols}")
    rng = np.random.default_rng([seed, rows, cols, _STREAM])
    share = float(rng.uniform(0.4, 1.0)) if fill is None else fill
    glyphs, records = sample_grid(rng, rows, cols, share)
    image = _render(rng, glyphs, rows, cols)
    questions = []
    for index in rng.permutation(len(records))[:num_questions]:
        record = records[int(index)]
        text = record.question(int(rng.integers(0, len(TEMPLATES))))
        first = record.row * cols + record.col
        questions.append(Question(text, record.answer, tuple(range(first, first + RECORD_LENGTH)), record))
    return Receipt(image, rows, cols, tuple(questions))


def sample_grid(
    rng: np.random.Generator, rows: int, cols: int, fill: float
) -> tuple[npt.NDArray[np.int64], list[Record]]:
    """Fill a grid: glyph numbers `[rows * cols]` int64, row-major, and the records among them (at least one)."""
    grid = np.full((rows, cols), BLANK, np.int64)
    marked = rng.random((rows, cols)) < _MARK_RATE
    grid[marked] = FIRST_MARK + rng.integers(0, len(MARKS), int(marked.sum()))
    places: list[tuple[int, int]] = []
    for row in range(rows):
        count = int(rng.binomial(cols // RECORD_LENGTH, fill))
        if count:
            # `count` records and the slack between them: sorted offsets into the slack keep them disjoint.
            offsets = np.sort(rng.integers(0, cols - count * RECORD_LENGTH + 1, count))
            places += [(row, int(offset) + i * RECORD_LENGTH) for i, offset in enumerate(offsets)]
    if not places:
        places.append((int(rng.integers(0, rows)), int(rng.integers(0, cols - RECORD_LENGTH + 1))))
    rng.shuffle(places)
    places = places[: min(_MAX_RECORDS, NUM_LABELS)]
    labels = rng.permutation(NUM_LABELS)[: len(places)]
    codes = rng.integers(0, len(CODE_CHARACTERS), (len(places), CODE_LENGTH))
    records = []
    for (row, col), label, code in zip(places, labels, codes, strict=True):
        grid[row, col] = FIRST_LABEL + label
        grid[row, col + 1 : col + RECORD_LENGTH] = code
        records.append(Record(int(label), tuple(int(c) for c in code), row, col))
    return grid.reshape(-1), records


def draw_cell(rng: np.random.Generator, glyph: int) -> npt.NDArray[np.uint8]:
    """Draw one cell with jittered place, size, colour, paper and noise: uint8 `[CELL, CELL, 3]`."""
    paper = int(rng.integers(238, 256))
    image = Image.new("RGB", (CELL, CELL), (paper, paper, paper))
    if glyph != BLANK:
        character, ink = _appearance(glyph)
        size = int(rng.integers(20, 24))
        ink = tuple(int(np.clip(c + rng.integers(-12, 13), 0, 255)) for c in ink)
        draw = ImageDraw.Draw(image)
        left, _, right, _ = draw.textbbox((0, 0), character, font=_font(size))
        # Centred in x; in y all sizes share a base line.
        x = (CELL - (right - left)) / 2 - left + int(rng.integers(-2, 3))
        y = 1 + (23 - size) / 2 + int(rng.integers(-2, 2))
        draw.text((x, y), character, font=_font(size), fill=ink)
    pixels = np.asarray(image).astype(np.int16)
    pixels = pixels + rng.integers(-6, 7, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _appearance(glyph: int) -> tuple[str, tuple[int, ...]]:
    if glyph < FIRST_LABEL:
        return CODE_CHARACTERS[glyph], _BLACK
    if glyph < FIRST_MARK:
        letter, colour = divmod(glyph - FIRST_LABEL, len(COLOURS))
        return LETTERS[letter], COLOURS[COLOUR_NAMES[colour]]
    return MARKS[glyph - FIRST_MARK], _GREY


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's embedded font: the same everywhere, no file needed."""
    return ImageFont.load_default(size=size)


def _render(rng: np.random.Generator, glyphs: npt.NDArray[np.int64], rows: int, cols: int) -> Image.Image:
    pixels = np.zeros((rows * CELL, cols * CELL, 3), np.uint8)
    for cell, glyph in enumerate(glyphs):
        y, x = (CELL * i for i in divmod(cell, cols))
        pixels[y : y + CELL, x : x + CELL] = draw_cell(rng, int(glyph))
    return Image.fromarray(pixels)
