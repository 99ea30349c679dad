"""Which rows are query rows."""

from dataclasses import replace

import pytest

from vlcache_sgl.api import Grid, Patches, Prompt, Rows, Span
from vlcache_sgl.api.prompt import FALLBACK_ROWS, post_vision, select_rows


def prompt(length: int, *vision: tuple[int, int], start: int = 0) -> Prompt:
    return Prompt(
        length=length,
        start=start,
        vision=tuple(Span(*span) for span in vision),
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )


ONE = prompt(100, (10, 80))
CASES = {
    "one-image": (Rows.post_vision(), ONE, (80, 100)),
    "limit-takes-the-latest": (Rows.post_vision(5), ONE, (95, 100)),
    "limit-larger-than-text": (Rows.post_vision(50), ONE, (80, 100)),
    "two-images-last-counts": (Rows.post_vision(), prompt(100, (5, 20), (40, 90)), (90, 100)),
    "image-last-falls-back": (Rows.post_vision(), prompt(100, (10, 100)), (68, 100)),
    "fallback-ignores-limit": (Rows.post_vision(5), prompt(100, (10, 100)), (68, 100)),
    "fallback-short-prompt": (Rows.post_vision(), prompt(8, (0, 8)), (0, 8)),
    "text-only-falls-back": (Rows.post_vision(), prompt(100), (68, 100)),
    "image-in-prefix": (Rows.post_vision(), prompt(100, (10, 80), start=90), (90, 100)),
    "image-partly-in-prefix": (Rows.post_vision(), prompt(100, (10, 80), start=40), (80, 100)),
    "image-last-with-prefix": (Rows.post_vision(), prompt(100, (10, 100), start=90), (90, 100)),
    "last": (Rows.last(32), ONE, (68, 100)),
    "last-with-prefix": (Rows.last(32), prompt(100, (10, 80), start=90), (90, 100)),
    "last-of-tiny": (Rows.last(32), prompt(5), (0, 5)),
    "all": (Rows.all(), prompt(100, (10, 80), start=30), (30, 100)),
    "none": (Rows(), ONE, (100, 100)),
}


@pytest.mark.parametrize(("rows", "given", "expected"), CASES.values(), ids=CASES)
def test_rows(rows, given, expected):
    assert select_rows(rows, given) == Span(*expected)


def test_fallback_is_the_snapkv_window():
    assert FALLBACK_ROWS == 32


def test_post_vision_is_empty_without_vision():
    assert len(post_vision(prompt(100))) == 0


def test_vision_mask_is_relative_to_the_owned_part():
    mask = prompt(10, (1, 3), (5, 8), start=2).is_vision()
    assert mask.tolist() == [True, False, False, True, True, True, False, False]


def lists(patches: Patches) -> dict[str, list[int]]:
    return {name: values.tolist() for name, values in patches._asdict().items()}


def test_patches_of_an_image_after_a_prefix_hit():
    """Two rows of three tokens at positions 2 to 7; positions before 4 are not owned."""
    given = replace(prompt(10, (2, 8), start=4), grids=((Grid(2, 3),),))
    assert lists(given.patches()) == {
        "grid": [0, 0, 0, 0, -1, -1],
        "row": [0, 1, 1, 1, -1, -1],
        "column": [2, 0, 1, 2, -1, -1],
        "rows": [2, 2, 2, 2, -1, -1],
        "columns": [3, 3, 3, 3, -1, -1],
    }


def test_patches_of_frames_of_newlines_and_of_what_is_not_known():
    """A video of two frames, an image that does not say, LLaVA's overview and tiles."""
    frames, tiles = (Grid(1, 2), Grid(1, 2)), (Grid(1, 1), Grid(2, 1, newlines=True))
    given = replace(prompt(14, (0, 4), (5, 7), (8, 13)), grids=(frames, (), tiles))
    found = lists(given.patches())
    assert found["grid"] == [0, 0, 1, 1, -1, -1, -1, -1, 0, 1, 1, 1, 1, -1]
    assert found["row"] == [0, 0, 0, 0, -1, -1, -1, -1, 0, 0, 0, 1, 1, -1]
    assert found["column"] == [0, 1, 0, 1, -1, -1, -1, -1, 0, 0, 1, 0, 1, -1]


def test_patches_where_no_grid_is_known():
    assert prompt(5, (1, 3)).patches().row.tolist() == [-1] * 5
