"""Where SGLang says that pictures are, for every way in which it says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
    MultimodalProcessorOutput,
)

from vlcache_sgl.api import Grid, Span
from vlcache_sgl.config import KVBudget
from vlcache_sgl.policy import resolve
from vlcache_sgl.policy.choice import Choice
from vlcache_sgl.scoring.asked import Asked
from vlcache_sgl.sglang_hooks.media import name_by_arrangement, vision_runs, vision_spans

SIDE, TILE = 6, 84


def item(modality: Modality = Modality.IMAGE, offsets: Any = None, **data: Any) -> MultimodalDataItem:
    return MultimodalDataItem(modality=modality, offsets=offsets, model_specific_data=data)


def inputs(*items: MultimodalDataItem) -> MultimodalInputs:
    return MultimodalInputs(mm_items=list(items))


def shapes(run: Any) -> list[tuple[int, int]]:
    return [(grid.rows, grid.columns) for grid in run.grids]


def test_offsets_are_inclusive_and_sorted() -> None:
    found = inputs(item(offsets=[(10, 13)]), item(Modality.AUDIO, [(20, 29)]), item(offsets=[(2, 5)]))
    assert vision_spans(found) == ((2, 6), (10, 14))
    assert [(run.begin, run.end, run.item) for run in vision_runs(found, None)] == [(2, 6, 1), (10, 14, 0)]
    assert vision_spans(None) == vision_spans(inputs()) == ()


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_patches_merge(merge: int) -> None:
    grid = torch.tensor([[1, 4 * merge, 5 * merge]])
    (run,) = vision_runs(inputs(item(offsets=[(7, 26)], image_grid_thw=grid)), None)
    assert shapes(run) == [(4, 5)]


def test_frames_of_a_video_in_one_run_and_in_several() -> None:
    grid = torch.tensor([[3, 4, 6]])
    whole = item(Modality.VIDEO, [(5, 22)], video_grid_thw=grid)
    (run,) = vision_runs(inputs(whole), None)
    assert (run.modality, shapes(run)) == ("video", [(2, 3)] * 3)
    apart = item(Modality.VIDEO, [(5, 10), (15, 20), (25, 30)], video_grid_thw=grid)
    runs = vision_runs(inputs(apart), None)
    assert [(run.begin, run.item, shapes(run)) for run in runs] == [(b, 0, [(2, 3)]) for b in (5, 15, 25)]


def test_a_job_tells_its_policy_the_grids() -> None:
    """Span for span: an image of 2 x 3 tokens between text, then a video of two frames of 1 x 2."""
    image = item(offsets=[(10, 15)], image_grid_thw=torch.tensor([[1, 4, 6]]))
    video = item(Modality.VIDEO, [(2, 5)], video_grid_thw=torch.tensor([[2, 2, 4]]))
    found = inputs(image, video)
    choice = Choice(resolve("streaming"), KVBudget(fraction=0.5))
    asked = Asked(choice, vision_spans(found), 20, min_tokens=0, runs=vision_runs(found, None))
    assert asked.vision == (Span(2, 6), Span(10, 16))
    assert asked.grids == ((Grid(1, 2), Grid(1, 2)), (Grid(2, 3),))


def names(*grids: Any, identity: bytes | None = None, **data: Any) -> list[tuple[int, ...]]:
    """What images of the same patches are called, one per grid, as SGLang's two processes do it."""
    items = [
        item(offsets=[(2 + 8 * number, 7 + 8 * number)], image_grid_thw=torch.tensor([grid]), **data)
        for number, grid in enumerate(grids)
    ]
    for one in items:
        one.feature = torch.ones(24, 3)
        if identity is None:
            one.set_pad_value()
        else:
            one.set_identity(identity)
    padded = MultimodalProcessorOutput.build_padded_input_ids([0] * (2 + 8 * len(items)), items)
    found = MultimodalInputs.from_processor_output(MultimodalProcessorOutput(mm_items=items, padded_input_ids=padded))
    name_by_arrangement(found)
    expected = [0, 0]
    for one in found.mm_items:
        expected += [*one.padding_sequence(6), 0, 0]
    assert found.padded_input_ids == expected
    return [one.padding_values() for one in found.mm_items]


@pytest.mark.parametrize("identity", [None, bytes(range(32))])
def test_the_name_of_an_image_says_how_its_patches_lie(identity: bytes | None) -> None:
    """With the hash that SGLang computes, and with the digest that a client may send instead."""
    wide, high, again = names([1, 4, 6], [1, 6, 4], [1, 4, 6], identity=identity)
    assert wide == again
    assert not set(wide) & set(high)
    assert names([1, 4, 6], identity=identity) == [wide]  # whatever stands beside it
    (slow,) = names([1, 4, 6], identity=identity, second_per_grid_ts=[1.0])
    assert slow != wide


def test_the_name_of_what_has_no_arrangement_stays() -> None:
    audio = item(Modality.AUDIO, [(2, 5)])
    audio.feature = torch.ones(4, 3)
    found = MultimodalInputs.from_processor_output(MultimodalProcessorOutput(mm_items=[audio]))
    before = found.mm_items[0].padding_values()
    name_by_arrangement(found)
    assert found.mm_items[0].padding_values() == before


def test_sizes_that_are_not_known_are_part_of_a_name() -> None:
    """What a processor says must not end the scheduler."""
    (whole,), (odd,) = names([1, 4, 6], image_sizes=[(4, 6)]), names([1, 4, 6], image_sizes=[None])
    assert whole != odd


def test_a_layout_that_cannot_be_read_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Every request asks for its layout, whether it reports it or not."""
    strange = SimpleNamespace(num_patches_per_side=SIDE, image_grid_pinpoints="strange")
    for _ in range(3):
        assert vision_runs(llava(100, (168, 168), "anyres"), strange)[0].grids == ()
    assert len([r for r in caplog.records if "layout of vision tokens" in r.message]) == 1


def test_what_does_not_fit_is_not_guessed() -> None:
    for wrong in ([[1, 4, 6], [1, 4, 6]], [[1, 5, 6]]):
        (run,) = vision_runs(inputs(item(offsets=[(5, 10)], image_grid_thw=torch.tensor(wrong))), None)
        assert run.grids == ()


class Llava:
    """What SGLang's model knows of its geometry."""

    num_patches_per_side = SIDE
    image_grid_pinpoints = [[TILE * w, TILE * h] for w, h in ((1, 2), (2, 1), (2, 2))]  # noqa: RUF012
    vision_tower = SimpleNamespace(config=SimpleNamespace(image_size=TILE))


def llava(length: int, size: tuple[int, int], ratio: str) -> MultimodalInputs:
    found = inputs(item(image_sizes=[size], image_aspect_ratio=ratio))
    found.image_offsets, found.image_pad_len = [4], [length]
    return found


def test_llava_keeps_offsets_beside_its_items() -> None:
    """Its items have none: without them its prompts would pass for text and never be compressed."""
    found = llava(36, (100, 100), "pad")
    assert vision_spans(found) == ((4, 40),)
    (run,) = vision_runs(found, Llava())
    assert [(grid.rows, grid.columns, grid.fit) for grid in run.grids] == [(6, 6, "pad")]


@pytest.mark.parametrize(
    ("size", "rows", "columns"), [((168, 168), 12, 12), ((300, 150), 6, 12), ((168, 126), 10, 12), ((80, 160), 12, 6)]
)
def test_llavas_tiles(size: tuple[int, int], rows: int, columns: int) -> None:
    """An overview, then what the picture fills of its tiles, each row with a newline."""
    length = 36 + rows * (columns + 1)
    (run,) = vision_runs(llava(length, size, "anyres"), Llava())
    assert shapes(run) == [(6, 6), (rows, columns)]
    assert [grid.newlines for grid in run.grids] == [False, True]
    assert sum(grid.tokens for grid in run.grids) == run.end - run.begin
    (other,) = vision_runs(llava(length + 1, size, "anyres"), Llava())
    assert other.grids == ()


def test_an_unknown_model_costs_the_layout_only() -> None:
    """No `vision_tower` where tiles are expected: the run is still there."""
    (run,) = vision_runs(llava(100, (168, 168), "anyres"), SimpleNamespace(num_patches_per_side=SIDE))
    assert (run.begin, run.end, run.grids) == (4, 104, ())
