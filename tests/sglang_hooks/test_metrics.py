"""The figures of /metrics: their names, their documentation, what is published.  A live server: tests/e2e."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from vlcache_sgl.counters import Counters
from vlcache_sgl.sglang_hooks import metrics
from vlcache_sgl.sglang_hooks.metrics import FIGURES, MAX_GROUPS, PREFIX, Metrics, layer_groups

ROOT = Path(__file__).parents[2]
SUFFIX = {"counter": "_total", "gauge": "", "histogram": ""}
PUBLISHED = {PREFIX + figure.name + SUFFIX[figure.kind] for figure in FIGURES}


def test_the_page_explains_every_figure() -> None:
    rows = re.findall(r"^\| `(vlcache:\w+)` \| (\w+) \|([^|]*)\|", (ROOT / "docs/metrics.md").read_text(), re.M)
    documented = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert documented == {PREFIX + f.name + SUFFIX[f.kind]: (f.kind, f.labels) for f in FIGURES}


def expressions() -> list[str]:
    dashboard = json.loads((ROOT / "dashboards/vlcache.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    return queries + [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]


def test_the_dashboard_asks_for_figures_that_exist() -> None:
    asked = {name for text in expressions() for name in re.findall(r"vlcache:\w+", text)}
    assert {name.removesuffix("_bucket") for name in asked} == PUBLISHED  # and shows all of them


def test_panels_do_not_overlap() -> None:
    places: set[tuple[int, int]] = set()
    for panel in json.loads((ROOT / "dashboards/vlcache.json").read_text())["panels"]:
        grid = panel["gridPos"]
        cells = {(grid["x"] + dx, grid["y"] + dy) for dx in range(grid["w"]) for dy in range(grid["h"])}
        assert not places & cells, panel["title"]
        assert max(x for x, _ in cells) < 24
        places |= cells


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 6, 27, 28, 80])
def test_groups_partition_the_layers(layers: int) -> None:
    groups = layer_groups(layers)
    assert [i for part in groups.values() for i in range(layers)[part]] == list(range(layers))
    sizes = [len(range(layers)[part]) for part in groups.values()]
    assert len(groups) == min(MAX_GROUPS, layers)
    assert max(sizes) - min(sizes) <= 1


def test_examples() -> None:
    assert doctest.testmod(metrics).failed == 0


@pytest.fixture(scope="module")
def published() -> Metrics:
    """One per process: prometheus_client knows each name once."""
    return Metrics({"model_name": "m"})


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(PREFIX + name, {"model_name": "m", **labels})


def test_totals_are_published_once(published: Metrics) -> None:
    counters = Counters()
    published.publish(counters, {"cells_free": 7}, counted=True)
    assert value("requests_compressed_total") == 0
    assert value("cells_free") == 7
    counters.compressed([10, 20], 100, 80)
    counters.skipped("short")
    counters.scoring_ms = 1500.0
    published.publish(counters, {"cells_free": 5}, counted=False)
    assert value("tokens_seen_total", modality="vision", layers="0") is None  # the device has not said yet
    counters.vision_kept([4, 5])
    for _ in range(2):  # the second time nothing has changed
        published.publish(counters, {"cells_free": 5}, counted=True)
    assert value("requests_compressed_total") == 1
    assert value("requests_skipped_total", reason="short") == 1
    assert value("scoring_seconds_total") == 1.5
    assert value("cells_free") == 5
    kept = {(m, i): value("tokens_kept_total", modality=m, layers=i) for m in ("vision", "text") for i in "01"}
    assert kept == {("vision", "0"): 4, ("vision", "1"): 5, ("text", "0"): 6, ("text", "1"): 15}
    assert value("tokens_seen_total", modality="text", layers="1") == 20
    assert value("kept_ratio_count") == 1
    assert value("kept_ratio_sum") == pytest.approx(0.15)
    counters.compressed([10, 20], 100, 80)
    counters.vision_kept([0, 0])
    published.publish(counters, {}, counted=True)
    assert value("tokens_kept_total", modality="vision", layers="0") == 4
    assert value("tokens_kept_total", modality="text", layers="0") == 16
