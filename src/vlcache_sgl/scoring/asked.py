"""What one request asks for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vlcache_sgl.api import Grid, Span
from vlcache_sgl.policy.choice import Choice


@dataclass(frozen=True)
class Run:
    """Consecutive vision tokens of a prompt."""

    begin: int
    end: int
    """Exclusive."""
    modality: str
    """``image`` or ``video``."""
    item: int
    """Which image or video of the prompt, from 0; a video may have one run per frame."""
    grids: tuple[Grid, ...] = ()
    """In the order of the tokens: one per frame, or LLaVA's overview and its tiles; empty where it is not known."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "grids": [asdict(grid) for grid in self.grids]}


@dataclass(frozen=True)
class Asked:
    """A prompt that is to be compressed, and how."""

    choice: Choice
    vision: tuple[Span, ...]
    """Vision tokens of the prompt, absolute positions."""
    length: int
    """Tokens of the prompt, generated ones not counted."""
    min_tokens: int
    """Prompts with fewer new tokens are left alone."""
    runs: tuple[Run, ...] = ()
    """What is known of each span of `vision`: for the policy, and for a report with `positions`."""
    positions: bool = False
    """Whether the report lists kept positions."""
    measures_attention: bool = False
    """Whether nothing is evicted, and the report says what of the answer's attention the decision would have kept."""
    repeated: int = 0
    """Tokens behind the prompt that read it again: of an internal request, which computes both and keeps the prompt."""

    @property
    def grids(self) -> tuple[tuple[Grid, ...], ...]:
        """`Prompt.grids`."""
        return tuple(run.grids for run in self.runs)

    @property
    def images_end(self) -> int:
        """Position behind the last image."""
        return self.vision[-1].end if self.vision else 0

    @property
    def end(self) -> int:
        """Where the decision falls: behind the prompt, or behind its second reading."""
        return self.length + self.repeated
