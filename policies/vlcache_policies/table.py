"""Table: layer weights measured beforehand, from a file.

Carries every method whose layer budgets come from offline calibration, for instance CompressKV
(https://arxiv.org/abs/2508.02401), EpiCache (https://arxiv.org/abs/2509.17396) and PrefixKV in its published form
(https://arxiv.org/abs/2412.03409).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from vlcache_sgl.api import Allocator, AllocatorPlugin, Budget, LayerView, Needs, Prompt, hookimpl


@dataclass(frozen=True)
class Table(Allocator):
    """Layers in proportion to the numbers in a JSON file: a list, or an object with the list under ``weights``.

    The least share per layer that CompressKV and EpiCache give is ``floor``; CompressKV's upper bound is ``most=3``.
    """

    needs: ClassVar[Needs] = Needs()

    file: str = field(default="", metadata={"operator_only": True})
    """Path of the JSON file; read once, when the policy is resolved."""
    most: float = 0.0
    """No layer gets more than this many times the average; 0 = no bound."""
    weights: tuple[float, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if not self.file:
            raise ValueError("file=PATH is required: a JSON list of one weight per layer")
        if self.most != 0 and self.most < 1:
            raise ValueError(f"most must be 0 or at least 1, got {self.most}")
        object.__setattr__(self, "weights", read_weights(Path(self.file)))

    def check(self, model: Prompt) -> None:
        """Raises ValueError when the file is for a model with another number of layers."""
        if len(self.weights) != model.num_layers:
            raise ValueError(f"{self.file} has {len(self.weights)} weights, the model has {model.num_layers} layers")

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        self.check(prompt)
        hi = budget.hi
        if self.most:
            hi = min(hi, math.ceil(self.most * budget.total / budget.num_layers))
        return Budget(budget.total, budget.num_layers, min(budget.lo, hi), hi).distribute(torch.tensor(self.weights))


def read_weights(path: Path) -> tuple[float, ...]:
    """The numbers in `path`.

    Raises:
        ValueError: not readable, not JSON, or not a list of numbers >= 0 of which one is positive.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read layer weights from {path}: {error}") from error
    listed = content.get("weights") if isinstance(content, dict) else content
    numbers = listed if isinstance(listed, list) else []
    if not any(numbers) or not all(type(x) in (int, float) and 0 <= x < math.inf for x in numbers):
        raise ValueError(f'{path} must hold a list of numbers >= 0, not all 0, alone or under "weights"')
    return tuple(float(x) for x in numbers)


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin("table", Table, summary="offline layer weights from a JSON file")
