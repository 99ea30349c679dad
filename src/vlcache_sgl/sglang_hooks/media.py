"""Where the images of a prompt are, how their tokens lie on them, and what they are called in the radix tree.

SGLang says where in two ways.  Most models give every item its `offsets`.  The LLaVA family in the original checkpoint
format keeps the offsets of all images in one list beside the items, with the length of each.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from vlcache_sgl.api import Grid, Span
from vlcache_sgl.scoring.asked import Run
from vlcache_sgl.sglang_hooks.facades import MediaItem, MultimodalInputs

logger = logging.getLogger(__name__)

ARRANGEMENT = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "image_sizes")
"""What processors say beside the patches of an item: how they lie, and how far the frames of a video are apart."""


def vision_spans(mm_inputs: MultimodalInputs | None) -> tuple[Span, ...]:
    """Image and video tokens of SGLang's multimodal inputs, ascending; audio is not vision."""
    return tuple(sorted(Span(begin, end) for begin, end, _, _ in _found(mm_inputs)))


def vision_runs(mm_inputs: MultimodalInputs | None, model: Any) -> tuple[Run, ...]:
    """The same with all that is known of each; `model` is SGLang's, LLaVA's geometry is its attributes."""
    found = list(_found(mm_inputs))
    lengths: dict[int, int] = {}
    for begin, end, _, number in found:
        lengths[number] = lengths.get(number, 0) + end - begin
    runs = []
    for begin, end, item, number in found:
        try:
            grids = _patches(item, end - begin, lengths[number]) or _tiles(item, end - begin, model)
        except Exception as error:
            # A layout is a bonus: a model that is built in another way must not end its scheduler.
            _warn_once(f"the layout of vision tokens is not known: {type(error).__name__}: {error}")
            grids = ()
        runs.append(Run(begin, end, item.modality.name.lower(), number, grids))
    return tuple(sorted(runs, key=lambda run: run.begin))


def name_by_arrangement(inputs: Any, *_: Any, **__: Any) -> None:
    """After SGLang has named the images and videos of a request by their patches: name them by how these lie, too.

    The name stands in the prompt in place of the item's tokens, so it decides who shares a prefix: 16 x 20 patches and
    20 x 16 of the same are one prompt otherwise, and each is answered from the other's keys.
    """
    named = [item for item in inputs.mm_items if _rename(item)]
    if named and inputs.padded_input_ids is not None:  # made with the names before, in the process that reads requests
        from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput

        inputs.padded_input_ids = MultimodalProcessorOutput.build_padded_input_ids(
            inputs.padded_input_ids, inputs.mm_items
        )


def _rename(item: Any) -> bool:
    """Whether there was something to say beside the patches."""
    data = item.model_specific_data
    said = {name: _plain(data[name]) for name in ARRANGEMENT if data.get(name) is not None}
    if not said:
        return False
    name = hashlib.sha256(item.identity or item.hash.to_bytes(8, "big"))
    name.update(repr(said).encode())
    if item.identity is None:
        item.set_hash(int.from_bytes(name.digest()[:8], "big"))
    else:
        item.set_identity(name.digest())
    return True


def _plain(value: Any) -> Any:
    """Numbers in lists, whatever a processor keeps them in."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value


@functools.cache
def _warn_once(text: str) -> None:
    """Every request asks for its layout: the same complaint about each would fill the log."""
    logger.warning(text)


def _found(mm_inputs: MultimodalInputs | None) -> Iterator[tuple[int, int, Any, int]]:
    """Begin, end (exclusive), item and its number, of every run of vision tokens."""
    if mm_inputs is None:
        return
    items = [item for item in mm_inputs.mm_items if item is not None and not item.is_audio()]
    if not any(item.offsets for item in items):
        begins = getattr(mm_inputs, "image_offsets", None) or ()
        lengths = getattr(mm_inputs, "image_pad_len", None) or ()
        # Not strict: what SGLang does not say of an image must not end its scheduler.
        for number, (begin, length, item) in enumerate(zip(begins, lengths, items, strict=False)):
            yield int(begin), int(begin) + int(length), item, number
        return
    for number, item in enumerate(items):
        for begin, end in item.offsets or ():
            yield int(begin), int(end) + 1, item, number  # SGLang's ends are inclusive


def _patches(item: MediaItem, tokens: int, of_item: int) -> tuple[Grid, ...]:
    """Qwen's: patches of the whole item are known, how many make a token follows from its length."""
    data = item.model_specific_data
    thw = data.get("image_grid_thw", data.get("video_grid_thw"))
    if thw is None:
        return ()
    table = torch.as_tensor(thw).reshape(-1, 3).tolist()
    if len(table) != 1:
        return ()
    frames, rows, columns = table[0]
    merge = math.isqrt(frames * rows * columns // max(1, of_item))
    if merge == 0 or rows % merge or columns % merge:
        return ()
    grid = Grid(rows // merge, columns // merge)
    return (grid,) * (tokens // grid.tokens) if tokens % grid.tokens == 0 else ()


def _tiles(item: MediaItem, tokens: int, model: Any) -> tuple[Grid, ...]:
    """LLaVA's: one square look at everything and, with ``anyres``, the tiles that the image was cut into."""
    side = getattr(model, "num_patches_per_side", None)
    data = item.model_specific_data
    if side is None or "image_aspect_ratio" not in data:  # Pixtral's and Mistral's are other models in the same class
        return ()
    sizes, ratio = data.get("image_sizes"), str(data["image_aspect_ratio"] or "")
    if not sizes:
        return ()
    square = Grid(side, side, fit="pad" if ratio == "pad" else "stretch")
    if tokens == square.tokens:
        return (square,)
    if "anyres" not in ratio:
        return ()
    from sglang.srt.multimodal.mm_utils import get_anyres_image_grid_shape, unpad_image_shape

    image_size = model.vision_tower.config.image_size
    wide, high = get_anyres_image_grid_shape(sizes[0], model.image_grid_pinpoints, image_size)
    rows, columns = unpad_image_shape(high * side, wide * side, sizes[0])
    most = re.match(r"anyres_max_(\d+)", ratio)
    times = math.sqrt(rows * columns / (int(most.group(1)) * side * side)) if most else 1.0
    if times > 1.1:  # SGLang shrinks what is larger than the checkpoint allows
        rows, columns = int(rows // times), int(columns // times)
    tiles = Grid(rows, columns, newlines=True)
    return (square, tiles) if square.tokens + tiles.tokens == tokens else ()
