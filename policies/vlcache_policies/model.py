"""Model: what each layer and KV head of the served model needs, measured beforehand on other prompts.

The weights come from KVzip's scores (https://arxiv.org/abs/2505.23416), see `vlcache calibrate`: which layers retrieve
is a property of the model, and the prompt only chooses tokens within them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlcache_policies.global_rank import Global
from vlcache_sgl.api import Allocator, AllocatorPlugin, Budget, LayerView, Prompt, declared, hookimpl


@dataclass(frozen=True)
class Model(Allocator):
    """Layers, and with ``heads=split`` KV heads, in proportion to the weights of ``--kv-weights``."""

    reads_weights: ClassVar[bool] = True

    unknown: Literal["equal", "rank"] = "equal"
    """What to do where the weights are not known: all layers alike, or one ranking over all layers (`global`)."""

    @property
    def compares_layers(self) -> bool:
        """Whether scores of different layers may have to be ranked."""
        return self.unknown == "rank"

    def check(self, model: Prompt) -> None:
        """Raises ValueError when the weights are those of another model."""
        if model.layer_weights and len(model.layer_weights) != model.num_layers:
            raise ValueError(f"--kv-weights has {len(model.layer_weights)} layers, the model has {model.num_layers}")

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        split = declared(layers[0].scores).shape[0] > 1
        if split and prompt.head_weights:
            return budget.distribute_heads(torch.tensor(prompt.head_weights))
        if prompt.layer_weights:
            return budget.distribute(torch.tensor(prompt.layer_weights))
        if self.unknown == "rank":
            return Global().allocate(layers, prompt, budget)
        return budget.distribute(torch.ones(budget.num_layers))


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin("model", Model, "2505.23416", "layers and KV heads by weights measured on the model")
