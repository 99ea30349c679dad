"""From a server's report to images."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlcache_sgl.inspection import layout, page, sheet
from vlcache_sgl.inspection.layout import Inspection, overlay, read_report
from vlcache_sgl.inspection.page import write_page
from vlcache_sgl.inspection.sheet import draw_sheet, shown_layers

BLACK = Image.new("RGB", (60, 40), (0, 0, 0))


def grid(rows: int, columns: int, newlines: bool = False, fit: str = "stretch") -> dict[str, Any]:
    return {"rows": rows, "columns": columns, "newlines": newlines, "fit": fit}


def seen(
    kept: list[list[int]],
    *grids: dict[str, Any],
    image: Image.Image = BLACK,
    question: str = "q?",
    numbers: tuple[int, ...] = (),
) -> Inspection:
    """A prompt of three text tokens, one image, two text tokens."""
    end = 3 + sum(g["rows"] * (g["columns"] + g["newlines"]) for g in grids)
    vision = [{"begin": 3, "end": end, "modality": "image", "item": 0, "grids": list(grids)}]
    report = {"kept_positions": kept, "vision": vision, "prompt_tokens": end + 2}
    return read_report(report, [image], question, ("full", "small"), "p", "0.1", "m", numbers=numbers)


@pytest.mark.parametrize("module", [layout, page, sheet])
def test_examples(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


def test_a_grid_is_row_major() -> None:
    found = seen([[0, 3, 4, 8], [3]], grid(2, 3))
    (look,) = found.looks
    assert found.look(look, 0).tolist() == [[True, True, False], [False, False, True]]
    assert found.layers_keeping(look).tolist() == [[1.0, 0.5, 0.0], [0.0, 0.0, 0.5]]
    assert found.is_vision.tolist() == [False] * 3 + [True] * 6 + [False] * 2
    assert found.ratio == pytest.approx(5 / 22)


def test_tiles_follow_the_overview_and_skip_newlines() -> None:
    found = seen([[*range(3, 7), 7, 8, 9, 10, 12]], grid(2, 2), grid(2, 3, newlines=True))
    overview, tiles = found.looks
    assert (overview.title, tiles.title) == ("overview", "tiles")
    assert found.look(overview, 0).all()
    # Tokens 7 8 9 | 10 newline | 11 12 13 | 14 newline.
    assert found.look(tiles, 0).tolist() == [[True, True, True], [False, True, False]]


def test_the_overlay_veils_what_is_evicted() -> None:
    found = seen([[3]], grid(2, 3))
    pixels = np.asarray(overlay(BLACK, found.looks[0], found.look(found.looks[0], 0)))
    assert (pixels[:20, :20] == 0).all()
    assert (pixels[:20, 20:] > 100).all()
    assert (pixels[20:] > 100).all()


def test_padding_is_outside_of_the_picture() -> None:
    """60 x 40 in a square of 60: a grid of 6 x 6 has its first and last row half outside, in the padding."""
    found = seen([list(range(3, 9))], grid(6, 6, fit="pad"))
    pixels = np.asarray(overlay(BLACK, found.looks[0], found.look(found.looks[0], 0)))
    assert (pixels > 100).all()  # row 0 covers lines -10 to 0
    found = seen([list(range(9, 15))], grid(6, 6, fit="pad"))
    pixels = np.asarray(overlay(BLACK, found.looks[0], found.look(found.looks[0], 0)))
    assert (pixels[:10] == 0).all()
    assert (pixels[10:] > 100).all()


def test_files(tmp_path: Path) -> None:
    found = seen([[0, 3, 4], [3, 7, 9]], grid(2, 3), question="</script><b>?</b> $x")
    draw_sheet(found, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1000
    write_page(found, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "<b>?</b>" not in page
    assert page.count("</script>") == 1
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing is loaded from elsewhere
    data = json.loads(re.search(r"const data = (.*);", page)[1].replace("<\\/", "</"))  # type: ignore[index]
    assert data["kept"] == [[0, 3, 4], [3, 7, 9]]
    assert data["images"][0].startswith("data:image/png;base64,")


@pytest.mark.parametrize("layers", [1, 5, 12, 13, 28, 80])
def test_first_and_last_layer_are_shown(layers: int) -> None:
    shown = shown_layers(layers)
    assert shown == sorted(set(shown))
    assert (shown[0], shown[-1]) == (0, layers - 1)
    assert len(shown) == min(layers, 12)


NOWHERE = {"begin": 1, "end": 2, "item": 0, "grids": []}


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"skipped": "short"}, "nothing was compressed: short"),
        ({"failed": "NaN"}, "nothing was compressed: NaN"),
        (
            {"kept_positions": [[1]], "prompt_tokens": 3, "vision": [{"begin": 1, "end": 2, "item": 0, "grids": []}]},
            "lie on",
        ),
    ],
)
def test_says_when_there_is_nothing_to_see(report: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_report(report, [BLACK], "q", ("", ""), "p", "0.1", "m")


def test_layers_of_a_hybrid_are_called_as_in_the_model(tmp_path: Path) -> None:
    found = seen([[3, 4], [3]], grid(2, 3), numbers=(3, 7))
    assert [found.number(layer) for layer in range(found.layers)] == [3, 7]
    assert seen([[3, 4], [3]], grid(2, 3)).number(1) == 1
    draw_sheet(found, tmp_path / "sheet.png")
    write_page(found, tmp_path / "page.html")
    assert '"numbers": [3, 7]' in (tmp_path / "page.html").read_text()
