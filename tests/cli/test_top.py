"""The screen of `vlcache top`, from states as a server gives them; a real server: tests/e2e/test_fidelity.py."""

from __future__ import annotations

import doctest
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vlcache_sgl.cli import top
from vlcache_sgl.cli.top import bar, combined, main, view


def state(**changes: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(top._SUMMED, 0),
        **{name: [] for name in top._BY_LAYER},
        "policy": "vlcache",
        "budget": "0.1",
        "bytes_per_cell": 100,
        "cells_per_token": 6,
        "requests_skipped": {},
        **changes,
    }


USED = state(
    cells_total=1000,
    cells_used=600,
    cells_free=400,
    cells_tree=500,
    cells_evictable=200,
    requests_compressed=3,
    requests_skipped={"short": 2},
    prefix_hits=2,
    policy_failures=1,
    cells_seen=600,
    cells_kept=60,
    seen_by_layer=[300, 300],
    kept_by_layer=[20, 40],
    vision_seen_by_layer=[250, 250],
    vision_kept_by_layer=[10, 15],
)


def text(now: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    more = {"model": "m", "schedulers": 1, "throughput": 12.0}
    now, before = {**now, **more, "at": 2.0}, None if before is None else {**before, **more, "at": 1.0}
    console = Console(width=160)
    with console.capture() as capture:
        console.print(view("http://x", now, before))
    return capture.get()


def test_examples() -> None:
    assert doctest.testmod(top).failed == 0


@given(st.lists(st.integers(0, 10**9), min_size=4, max_size=4))
def test_the_bar_is_full_and_shows_everything(cells: list[int]) -> None:
    chars = bar(cells, 60)
    if any(cells):
        assert sum(chars) == 60
        assert all((count > 0) == (have > 0) for count, have in zip(cells, chars, strict=True))


def test_the_screen() -> None:
    shown = text(USED, {**USED, "requests_compressed": 1, "prefix_hits": 0})
    for words in ("own 10.0%", "tree, in use 30.0%", "tree, evictable 20.0%", "free 40.0%", "2.0/s", "short 2"):
        assert words in shown
    assert "60.0 kB of 100.0 kB" in shown
    assert "vision 5.0%, text 35.0%" in shown
    assert "6.7% to 13.3%" in shown


def test_host_memory_is_shown_where_there_is_some() -> None:
    shown = text({**USED, "host_tokens_total": 1000, "host_tokens_used": 250, "host_bytes_per_token": 2000})
    assert "25.0%" in shown
    assert "500.0 kB of 2.0 MB" in shown
    assert "host memory" not in text(USED)


def test_a_fresh_server_shows_too() -> None:
    assert "-" in text(state(cells_total=10, cells_free=10))


def test_several_schedulers_are_added() -> None:
    both = combined([USED, {**USED, "requests_skipped": {"scope": 1}}])
    assert both["cells_used"] == 1200
    assert both["requests_skipped"] == {"short": 2, "scope": 1}
    assert both["kept_by_layer"] == [40, 80]
    assert combined([state(), USED])["kept_by_layer"] == [20, 40]


def test_no_server(capsys: Any) -> None:
    assert main(["--once", "--base-url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9" in capsys.readouterr().out
