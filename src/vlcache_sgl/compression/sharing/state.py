"""How one request shares its images: the copy it looks for or makes, and how well it finds what it looks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlcache_sgl.compression.sharing.guard import DecodeReading, GuardReading
from vlcache_sgl.compression.sharing.images import SharedImage
from vlcache_sgl.scoring.asked import Asked

Phase = Literal["prefill", "decode"]
"""Where a guard has seen what a request misses."""


@dataclass
class SharingState:
    """Everything that sharing knows of one request."""

    asked: Asked
    report: dict[str, Any]
    """The request's report: what sharing did is added to it."""
    tokens: Sequence[int] = ()
    """The prompt's token numbers, SGLang's array."""
    image: SharedImage | None = None
    """What is known of the prompt's first picture; None where nothing needs to be."""
    base_key: str = ""
    """The radix key's namespace, without the generation of the picture's copy."""
    generation: int = 0
    """Of the copy that this request looks for or makes."""
    guard: GuardReading | None = None
    """How well the present prefill finds what it looks for."""
    decode_guard: DecodeReading | None = None
    """The same for the first decode steps, also of whoever has just compressed the picture."""
    trips: int = 0
    """How often it did not, and started over."""
    missed: float = 0.0
    """The reading of the last time."""
    missed_in: Phase = "prefill"
    """Whose reading it was."""
    inherited: torch.Tensor | None = None
    """`[L, end]` bool: what the copy before the one that this request makes has of the pictures."""

    @property
    def reads_decode(self) -> bool:
        """Whether decode steps of this request are read."""
        return self.decode_guard is not None and not self.decode_guard.complete

    def trip(self, missing: float, seen_in: Phase) -> None:
        """The guard has found too little of what the request looks for."""
        self.trips += 1
        self.missed, self.missed_in = round(missing, 4), seen_in

    def restart(self) -> None:
        """Begin anew: the request was retracted and is prefilled again.  Its report has been emptied."""
        self.guard = self.decode_guard = None
        if self.trips:
            self.report.update(recomputed=self.trips, missed=self.missed, missed_in=self.missed_in)
