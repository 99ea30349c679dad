"""From a server's report to images."""

from __future__ import annotations

import dataclasses
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


def seen(kept: list[list[int]], *grids: dict[str, Any], image: Image.Image = BLACK, question: str = "q?") -> Inspection:
    """A prompt of three text tokens, one image, two text tokens."""
    end = 3 + sum(g["rows"] * (g["columns"] + g["newlines"]) for g in grids)
    vision = [{"begin": 3, "end": end, "modality": "image", "item": 0, "grids": list(grids)}]
    report = {"kept_positions": kept, "vision": vision, "prompt_tokens": end + 2}
    return read_report(report, [image], question, ("full", "small"), "p", "0.1", "m")


def test_the_earlier_questions_are_named(tmp_path: Path) -> None:
    found = dataclasses.replace(seen([[3]], grid(2, 3)), earlier=("what came <first>?",))
    write_page(found, tmp_path / "a.html")
    assert "<td>asked before</td><td>what came &lt;first&gt;?</td>" in (tmp_path / "a.html").read_text()
    figure = drawn_texts(found, tmp_path / "a.png")
    assert "asked before: what came <first>?" in figure


def drawn_texts(found: Inspection, path: Path) -> list[str]:
    """What `draw_sheet` writes in the head of the sheet."""
    from matplotlib.figure import SubFigure

    written: list[str] = []
    original = SubFigure.text

    def text(self: Any, x: float, y: float, s: str, *args: Any, **kwargs: Any) -> Any:
        written.append(s)
        return original(self, x, y, s, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubFigure, "text", text)
        draw_sheet(found, path)
    return written


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


def shared_report(positions: list[list[int]], **more: Any) -> dict[str, Any]:
    """Of a question about the image that another one has asked about."""
    grid = {"rows": 2, "columns": 3, "newlines": False, "fit": "stretch"}
    run = {"begin": 2, "end": 8, "modality": "image", "item": 0, "grids": [grid]}
    return {"kept_positions": positions, "vision": [run], **more}


def test_what_a_copy_has_gained_is_tinted(tmp_path: Path) -> None:
    report = shared_report(
        [[0, 2, 3, 7, 8, 9]], recomputed=1, missed=0.41, missed_in="decode", share_budget=0.2, generation=1
    )
    seen = read_report(report, [BLACK], "second?", ("a", "a"), "vlcache", "0.1", "m", before=shared_report([[0, 2, 8]]))
    look = seen.looks[0]
    gained = seen.gained(look, 0)
    assert gained is not None
    assert gained.tolist() == [[False, True, False], [False, False, True]]
    pixels = np.asarray(overlay(BLACK, look, seen.look(look, 0), gained))
    corner = pixels[0, 0].tolist(), pixels[-1, -1].tolist()
    assert corner[0] == [0, 0, 0]
    assert corner[1][0] > corner[1][2], "orange"
    assert seen.sharing == (
        "a copy for all questions, number 1, 20% of images; "
        "its answer missed about 41% in the copy before: the image was recomputed"
    )
    draw_sheet(seen, tmp_path / "sheet.png")
    write_page(seen, tmp_path / "page.html")
    assert "gained since the question before" in (tmp_path / "page.html").read_text()
    assert Image.open(tmp_path / "sheet.png").width > 1000


def test_a_guard_that_is_content_is_told_too() -> None:
    report = shared_report([[0, 2]], guard={"missing": 0.03, "threshold": 0.2, "tripped": False})
    seen = read_report(report, [BLACK], "?", ("a", "a"), "vlcache", "0.1", "m")
    assert seen.sharing == "the question misses about 3% of its attention in the shared copy"
    assert seen.gained(seen.looks[0], 0) is None
