"""Weights of a model on their way to running schedulers, as the numbers that SGLang's internal state is set with.

SGLang broadcasts them in the order of requests, so that all tensor-parallel ranks change between the same two.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlcache_sgl.weights import ModelWeights

PREFIX = "kv_weights."
"""Begins every name: ``kv_weights.3`` is the weight of layer 3, ``kv_weights.3.1`` that of its KV head 1."""


def knobs_of(weights: ModelWeights) -> dict[str, float]:
    """The numbers of weights by name."""
    layers = {f"{PREFIX}{layer}": share for layer, share in enumerate(weights.layers)}
    heads = {
        f"{PREFIX}{layer}.{head}": share
        for layer, shares in enumerate(weights.heads)
        for head, share in enumerate(shares)
    }
    return layers | heads


def are_knobs(numbers: Mapping[str, float]) -> bool:
    """Whether any of them is meant for us."""
    return any(name.startswith(PREFIX) for name in numbers)


def weights_of(numbers: Mapping[str, float]) -> ModelWeights:
    """The opposite of `knobs_of`; what was measured, and on which model, does not travel.

    Raises:
        ValueError: a name is not ours or missing, or a number is no share.
    """
    places = {name: _place(name) for name in numbers}
    given = {place: float(numbers[name]) for name, place in places.items()}
    layers = 1 + max(layer for layer, *_ in given)
    kv_heads = max((1 + place[1] for place in given if len(place) > 1), default=0)
    names = {(layer,) for layer in range(layers)} | {(layer, k) for layer in range(layers) for k in range(kv_heads)}
    if len(given) != len(numbers) or given.keys() != names:
        raise ValueError(f"{PREFIX}LAYER must be there for every layer, {PREFIX}LAYER.HEAD for all heads or none")
    return ModelWeights(
        tuple(given[(layer,)] for layer in range(layers)),
        tuple(tuple(given[(layer, k)] for k in range(kv_heads)) for layer in range(layers)) if kv_heads else (),
    )


def _place(name: str) -> tuple[int, ...]:
    numbers = name.removeprefix(PREFIX).split(".")
    if not name.startswith(PREFIX) or len(numbers) > 2 or not all(n.isascii() and n.isdigit() for n in numbers):
        raise ValueError(f"{name!r} is not {PREFIX}LAYER or {PREFIX}LAYER.HEAD")
    return tuple(int(number) for number in numbers)
