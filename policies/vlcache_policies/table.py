"""Table: layer weights measured beforehand, from a file or spelled out.

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
from typing import ClassVar, Literal

import torch

from vlcache_sgl.api import Allocator, AllocatorPlugin, Budget, BudgetSum, LayerView, Needs, Prompt, hookimpl


@dataclass(frozen=True)
class Table(Allocator):
    """Layers in proportion to numbers from a JSON file (a list, or an object with the list under ``weights``) or from
    the policy's own text: ``weights=1/1/10/0/0/0``.

    The least share per layer that CompressKV and EpiCache give is ``floor``; CompressKV's upper bound is ``most=3``.
    """

    needs: ClassVar[Needs] = Needs()

    file: str = field(default="", metadata={"operator_only": True})
    """Path of the JSON file; read once, when the policy is resolved.  This or `weights`."""
    weights: str = ""
    """One number per layer, from the first to the last, separated by slashes.  This or `file`."""
    basis: Literal["budget", "vision"] = "budget"
    """``budget``: layers divide the budget in proportion to their weights.  ``vision``: a weight is the share of its
    vision tokens that a layer keeps, beside all text (with ``protect=text``); the budget is an upper bound."""
    most: float = 0.0
    """No layer gets more than this many times the average; 0 = no bound."""
    numbers: tuple[float, ...] = field(init=False, default=())
    """What `file` or `weights` says, one number per layer."""

    def __post_init__(self) -> None:
        if bool(self.file) == bool(self.weights):
            raise ValueError("give one of file=PATH (JSON, one weight per layer) and weights=A/B/... (the same inline)")
        if self.most != 0 and self.most < 1:
            raise ValueError(f"most must be 0 or at least 1, got {self.most}")
        numbers = read_weights(Path(self.file)) if self.file else parse_weights(self.weights)
        if self.basis == "vision" and max(numbers) > 1:
            raise ValueError(f"with basis=vision weights are shares in [0, 1], got {max(numbers):g}")
        object.__setattr__(self, "numbers", numbers)

    @property
    def budget_sum(self) -> BudgetSum:
        """Shares of vision tokens may need less than the budget; `most` may leave some of it to nobody."""
        return "at_most" if self.basis == "vision" or self.most else "exact"

    def check(self, model: Prompt) -> None:
        """Raises ValueError when the weights are for a model with another number of layers."""
        if len(self.numbers) != model.num_layers:
            what = self.file or "weights="
            raise ValueError(f"{what} has {len(self.numbers)} weights, the model has {model.num_layers} layers")

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        self.check(prompt)
        wanted = torch.tensor(self.numbers, dtype=torch.float64)
        total = budget.total
        if self.basis == "vision":
            wanted = wanted * prompt.owned_vision + (prompt.owned - prompt.owned_vision)
            # Distributing exactly what is wanted gives just that; less than it gives every layer its part of less.
            total = min(total, math.ceil(float(wanted.sum()) - 1e-6))
        hi = budget.hi
        if self.most:
            hi = min(hi, math.ceil(self.most * budget.total / budget.num_layers))
        return Budget(total, budget.num_layers, min(budget.lo, hi), hi).distribute(wanted)


def parse_weights(text: str) -> tuple[float, ...]:
    """The numbers in ``1/0.5/0``.

    Raises:
        ValueError: as `read_weights`.
    """
    try:
        listed: object = [float(part) for part in text.split("/")]
    except ValueError:
        listed = None
    return _numbers(listed, f"weights={text} must be numbers >= 0 separated by /, not all 0")


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
    return _numbers(listed, f'{path} must hold a list of numbers >= 0, not all 0, alone or under "weights"')


def _numbers(listed: object, complaint: str) -> tuple[float, ...]:
    numbers = listed if isinstance(listed, list) else []
    if not any(numbers) or not all(type(x) in (int, float) and 0 <= x < math.inf for x in numbers):
        raise ValueError(complaint)
    return tuple(float(x) for x in numbers)


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin("table", Table, summary="offline layer weights, from a JSON file or inline")
