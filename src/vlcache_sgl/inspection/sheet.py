"""One PNG: the image under every layer's eyes, budgets, positions, answers."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from vlcache_sgl.inspection.layout import Inspection, Look, overlay, places

MAX_LAYERS = 12
"""Overlays on a sheet; of a deeper model evenly chosen layers are shown (the page shows all)."""
_ACROSS = 6
_MOST_LABELS = 40
"""Layers beside whose bars there is room for a number."""
_VISION, _TEXT, _GREY = "#0b7285", "#e8590c", "#868e96"


def draw_sheet(seen: Inspection, path: Path) -> None:
    """Write the PNG."""
    from matplotlib.figure import Figure

    shown = shown_layers(seen.layers)
    lines = math.ceil(len(shown) / _ACROSS)
    images = [seen.images[look.item] for look in seen.looks]
    shape = sum(image.height / image.width for image in images)  # height of one column of overlays, in widths
    width = 15.0
    cell = width / _ACROSS
    heights = [1.3, 4.6, 2.6, lines * shape * cell + 0.35 * lines * len(seen.looks)]
    figure = Figure(figsize=(width, sum(heights) + 0.8), layout="constrained", facecolor="white")
    parts: Any = figure.subfigures(4, 1, height_ratios=heights)
    head, top, middle, bottom = parts
    _head(head, seen)
    _top(top, seen)
    _map(middle, seen)
    grid = bottom.subplots(lines * len(seen.looks), _ACROSS, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for number, layer in enumerate(shown):
        line, column = divmod(number, _ACROSS)
        for place, look in enumerate(seen.looks):
            axis = grid[line * len(seen.looks) + place][column]
            _image(axis, overlay(seen.images[look.item], look, seen.look(look, layer)))
            name = f", {look.title}" if len(seen.looks) > 1 else ""
            axis.set_title(f"layer {seen.number(layer)}{name}: {seen.look(look, layer).mean():.0%} kept", fontsize=9)
    figure.savefig(path, dpi=110)


def shown_layers(layers: int) -> list[int]:
    """At most MAX_LAYERS, the first and the last among them.

    >>> shown_layers(3), len(shown_layers(80))
    ([0, 1, 2], 12)
    """
    return [int(layer) for layer in np.unique(np.linspace(0, layers - 1, min(layers, MAX_LAYERS)).round())]


def _head(figure: Any, seen: Inspection) -> None:
    same = seen.answer == seen.full_answer
    question = textwrap.shorten(seen.question, 150)
    lines = [
        (question, "black", 14),
        (f"full cache: {textwrap.shorten(seen.full_answer, 140) or '(nothing)'}", "black", 11),
        (
            f"{seen.policy}, budget {seen.budget}: {textwrap.shorten(seen.answer, 120) or '(nothing)'}"
            f"   {'the same' if same else 'another answer'}",
            "#2b8a3e" if same else "#c92a2a",
            11,
        ),
        (
            f"{seen.model}: {seen.kept.shape[1]} prompt tokens, {int(seen.is_vision.sum())} of them vision; "
            f"{seen.ratio:.1%} of {seen.layers} layers' tokens kept",
            _GREY,
            9.5,
        ),
    ]
    for number, (text, colour, size) in enumerate(lines):
        figure.text(
            0.01, 0.88 - (1.0 / len(lines)) * number, text, color=colour, fontsize=size, va="center", parse_math=False
        )


def _top(figure: Any, seen: Inspection) -> None:
    count = len(seen.looks)
    axes = figure.subplots(1, count + 2, width_ratios=[1] * (count + 1) + [1.2])
    _image(axes[0], seen.images[0])
    axes[0].set_title("the image" if len(seen.images) == 1 else f"the first of {len(seen.images)} images", fontsize=10)
    for axis, look in zip(axes[1:], seen.looks, strict=False):
        drawn = _heat(axis, seen, look)
        name = f" ({look.title})" if count > 1 else ""
        axis.set_title(f"how many layers keep a patch{name}", fontsize=10)
    figure.colorbar(drawn, ax=axes[count], shrink=0.8, label="share of layers")
    bars = axes[-1]
    vision = seen.kept[:, seen.is_vision].sum(1)
    text = seen.kept[:, ~seen.is_vision].sum(1)
    layers = np.arange(seen.layers)
    bars.barh(layers, vision, color=_VISION, label="vision")
    bars.barh(layers, text, left=vision, color=_TEXT, label="text")
    bars.axvline(seen.kept.sum(1).mean(), color="black", linestyle="--", linewidth=1, label="average")
    bars.set(xlabel="tokens kept", ylabel="layer")
    if 0 < len(seen.attention) <= _MOST_LABELS:
        bars.set_xlabel("tokens kept; beside the bars: their share of the answer's attention")
        bars.margins(x=0.15)
        paper = {"facecolor": "white", "linewidth": 0, "pad": 0.5}
        for layer, share in enumerate(seen.attention):
            place = (seen.kept[layer].sum(), layer)
            bars.annotate(
                f"{share:.0%}", place, (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=paper
            )
    bars.invert_yaxis()
    bars.yaxis.get_major_locator().set_params(integer=True)
    if seen.numbers:
        bars.set_yticks(layers, labels=[str(number) for number in seen.numbers], fontsize=8)
    bars.set_title("layer budgets", fontsize=10)
    bars.spines[["top", "right"]].set_visible(False)
    bars.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _heat(axis: Any, seen: Inspection, look: Look) -> Any:
    image = seen.images[look.item]
    lines, columns = places(look, image.width, image.height)
    share = seen.layers_keeping(look)[lines[:, None], columns[None, :]]
    _image(axis, image.convert("L").convert("RGB"))
    return axis.imshow(share, cmap="viridis", vmin=0, vmax=1, alpha=0.75, interpolation="nearest")


def _map(figure: Any, seen: Inspection) -> None:
    axis = figure.subplots()
    values = np.where(seen.kept, np.where(seen.is_vision, 2, 1), 0)
    from matplotlib.colors import ListedColormap

    axis.imshow(
        values, aspect="auto", interpolation="nearest", cmap=ListedColormap(["#f1f3f5", _TEXT, _VISION]), vmin=0, vmax=2
    )
    axis.set(xlabel="position in the prompt", ylabel="layer")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_title("what each layer keeps: vision in blue, text in orange", fontsize=10)


def _image(axis: Any, image: Any) -> None:
    axis.imshow(np.asarray(image))
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("#ced4da")
