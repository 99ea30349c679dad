"""Where SGLang says that pictures are, for every way in which it says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

from vlcache_sgl.api import Grid, Span
from vlcache_sgl.config import KVBudget
from vlcache_sgl.policy import resolve
from vlcache_sgl.policy.choice import Choice
from vlcache_sgl.scoring.asked import Asked
from vlcache_sgl.sglang_hooks.media import vision_runs, vision_spans

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
