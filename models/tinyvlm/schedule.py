"""What the two bundled checkpoints were trained on, as data."""

from __future__ import annotations

from dataclasses import dataclass

ALL_TEMPLATES = (0, 1, 2, 3)
BOOTSTRAP = 4
"""Index of the training-only question form in which the code follows the label directly (see batches.py)."""


@dataclass(frozen=True)
class Stage:
    """Some steps on images of some sizes; only the answers count unless a weight below is set."""

    grids: str
    """Sizes, `ROWSxCOLS` separated by commas; each step draws one.  Repeat a size to draw it more often."""
    batch: int
    """Images per step."""
    questions: int
    """Questions per image and step; they share the image's keys and values."""
    steps: int
    target: float = 1.0
    """Exact match, on training batches and in two reports in a row, that ends the stage early (unless `anneal`)."""
    templates: tuple[int, ...] = ALL_TEMPLATES
    rate: float = 1.0
    """Factor on the schedule's learning rate."""
    warm_up: int = 20
    """Steps in which the learning rate rises from nothing."""
    anneal: bool = False
    """The learning rate falls along a cosine, nearly to nothing at the last step."""
    grounding: float = 0.0
    """Weight of `losses.grounding`: the tail of the question attends to what answers it."""
    ranking: float = 0.0
    """Weight of `losses.ranking`: the record ranks among the first post-vision scores."""
    density: float = 0.0
    """Weight of `losses.excess_density`: post-vision rows attend to few tokens, in every layer."""
    compressed: float = 0.0
    """Probability of a step in which answers are decoded from a compressed cache (for the observed questions)."""
    observed: int = 4
    """Questions per image whose attention the four settings above look at; all would cost as much as the model."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, cols) of each entry of `grids`."""
        return tuple((int(rows), int(cols)) for rows, cols in (grid.split("x") for grid in self.grids.split(",")))


@dataclass(frozen=True)
class Schedule:
    """Stages in order, from a checkpoint or from nothing."""

    stages: tuple[Stage, ...]
    start: str | None = None
    """Name of the checkpoint folder to begin with; None: new weights, and the vision tower is aligned first."""
    learning_rate: float = 1.5e-3
    first_character: float = 1.0
    """Loss weight of the first answer character, which needs the look-up; the others follow it."""
    fill: tuple[float, float] = (0.5, 1.0)
    """Range of the share of each image's room that records take."""


SCHEDULES: dict[str, Schedule] = {
    # A curriculum from one row of six cells to 32 x 32.  Trained on answers only, the model looks each character up
    # just in time: what the question attends to in prefill says little about what decoding will need.
    "ungrounded": Schedule(
        first_character=2.0,
        stages=(
            Stage("1x6", 128, 1, 250, 0.5, templates=(BOOTSTRAP,), warm_up=60),
            Stage("2x6", 96, 2, 400, 0.55, templates=(BOOTSTRAP,)),
            Stage("3x6", 64, 3, 200, 0.75, templates=(BOOTSTRAP,)),
            Stage("4x6", 64, 4, 400, 0.8, templates=(BOOTSTRAP, 2)),
            Stage("4x6,5x6", 64, 4, 500, 0.8, templates=(BOOTSTRAP, *ALL_TEMPLATES)),
            Stage("4x11,6x6", 40, 6, 600, 0.85),
            Stage("6x11,8x8,4x16", 24, 8, 600, 0.88),
            Stage("8x16,11x11,16x8", 16, 10, 600, 0.9),
            Stage("16x16,12x20,10x11", 10, 12, 800, 0.93),
            Stage("24x24,16x32,16x16", 5, 14, 400, 0.93),
            Stage("32x32,16x16,24x24,20x32", 4, 16, 1200, anneal=True),
        ),
    ),
    # The same model, taught what large pretrained VLMs are observed to do: the question's rows attend to the record, to
    # little else, and decoding gets along with what they attended to.
    "grounded": Schedule(
        start="ungrounded",
        learning_rate=7e-4,
        stages=(
            Stage("16x16,12x20,10x11,24x24", 7, 12, 300, grounding=0.1, ranking=0.1, density=0.1),
            Stage(
                "16x16,12x20,10x11,24x24,24x24,20x32,32x32,32x32",
                6,
                12,
                1100,
                anneal=True,
                grounding=0.1,
                ranking=0.1,
                density=0.1,
                compressed=0.7,
                observed=6,
            ),
            # What a long mixed stage neglects: the smallest and the largest grids.
            Stage(
                "10x11,10x11,12x20,16x16,24x24,20x32,32x32,32x32",
                6,
                12,
                240,
                rate=0.3,
                anneal=True,
                grounding=0.1,
                ranking=0.1,
                density=0.1,
                compressed=0.5,
                observed=6,
            ),
        ),
    ),
}
