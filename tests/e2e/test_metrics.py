"""SGLang's /metrics on a live server: our figures are there, under SGLang's labels, and are those of /server_info."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from vlcache_sgl.sglang_hooks.metrics import FIGURES, PREFIX

ROOT = Path(__file__).parents[2]
RATIO_SUM = "vlcache:kept_ratio_sum"
SKIPPED = {"short": 1, "budget": 1, "scope": 1}
"""Why three of the requests were not compressed: a question about a known image, budget 1.0, a text."""
SUFFIX = {"counter": "_total", "gauge": "", "histogram": "_count"}


class Scrape:
    """What one GET /metrics says."""

    def __init__(self, server: Any) -> None:
        reply = httpx.get(f"{server.url}/metrics", timeout=30)
        reply.raise_for_status()
        families = text_string_to_metric_families(reply.text)
        self.samples = [sample for family in families for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Sum over all series of a name that have these labels."""
        found = [s for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(sample.value for sample in found)

    def labels(self, name: str) -> dict[str, str]:
        return next(sample.labels for sample in self.samples if sample.name == name)


def scrape_when(server: Any, name: str, value: float) -> Scrape:
    """The first scrape that says so: figures are published once the scheduler is idle, just after the answer."""
    for _ in range(100):
        found = Scrape(server)
        if found.total(name) == value:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{name} is {found.total(name)}, not {value}")


def test_figures_are_those_of_server_info(ours_tenth: Any, picture: Any) -> None:
    """Totals since the server's start, and what these requests added to them."""
    server = ours_tenth
    server.flush()
    before, earlier = server.settled(), scrape_when(server, "vlcache:cells_used", 0)
    drawn = [picture(7700 + i, 20, 20) for i in range(2)]
    policy = {"custom_params": {"kv_share": "policy"}}
    for one in drawn:
        server.ask(one.questions[0].text, one.image, **policy)
    server.ask(drawn[0].questions[1].text, drawn[0].image, **policy)  # finds its image compressed
    server.ask(drawn[0].questions[0].text, drawn[0].image, custom_params={"kv_budget": 1.0})
    server.ask("red K? " * 100)
    state = server.settled()
    found = scrape_when(server, "vlcache:cells_used", state["cells_used"])
    for figure in FIGURES:
        assert [s for s in found.samples if s.name == PREFIX + figure.name + SUFFIX[figure.kind]], figure.name
    for name in ("cells_total", "cells_used", "cells_free", "cells_tree", "cells_evictable", "cells_per_token"):
        assert found.total(PREFIX + name) == state[name]
    for name in ("requests_compressed", "policy_failures", "prefix_hits", "prefix_hit_tokens"):
        assert found.total(f"{PREFIX}{name}_total") == state[name]
    assert state["prefix_hits"] - before["prefix_hits"] == 1
    assert state["prefix_hit_tokens"] - before["prefix_hit_tokens"] >= drawn[0].num_image_tokens
    skipped, known = state["requests_skipped"], before["requests_skipped"]
    added = {reason: skipped[reason] - known.get(reason, 0) for reason in skipped}
    assert {reason: count for reason, count in added.items() if count} == SKIPPED
    for reason, count in state["requests_skipped"].items():
        assert found.total("vlcache:requests_skipped_total", reason=reason) == count
    assert found.total("vlcache:tokens_seen_total") == state["cells_seen"]
    assert found.total("vlcache:tokens_kept_total") == state["cells_kept"]
    layers = state["cells_per_token"]
    images = sum(one.num_image_tokens for one in drawn)
    seen = "vlcache:tokens_seen_total"
    assert found.total(seen, modality="vision") - earlier.total(seen, modality="vision") == layers * images
    kept = found.total("vlcache:tokens_kept_total", modality="vision")
    assert kept == sum(state["vision_kept_by_layer"])
    assert 0 < kept < state["cells_kept"]
    ratios = {name: found.total(name) - earlier.total(name) for name in ("vlcache:kept_ratio_count", RATIO_SUM)}
    assert ratios == {"vlcache:kept_ratio_count": 2, RATIO_SUM: pytest.approx(0.2, abs=0.01)}
    for name in ("prefill", "scoring", "selection"):
        assert found.total(f"vlcache:{name}_seconds_total") == pytest.approx(state[f"{name}_ms"] / 1e3, abs=1e-5)


def test_labels_are_sglangs(ours_tenth: Any, picture: Any) -> None:
    server = ours_tenth
    server.ask(picture(7700, 20, 20).questions[0].text, picture(7700, 20, 20).image)
    found = Scrape(server)
    assert found.labels("vlcache:cells_used") == found.labels("sglang:num_running_reqs")


def test_the_dashboard_finds_what_it_asks_for(ours_tenth: Any, picture: Any) -> None:
    """Every series that a panel names, and every label that it selects or groups by."""
    server, drawn = ours_tenth, picture(7705, 20, 20)
    server.ask(drawn.questions[0].text, drawn.image)
    server.ask(drawn.questions[0].text, drawn.image, custom_params={"kv_budget": 1.0})
    found = scrape_when(server, "vlcache:cells_used", server.settled()["cells_used"])
    panels = json.loads((ROOT / "dashboards/vlcache.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert len(queries) > 20
    for query in queries:
        grouped = [label for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(", ")]
        asked = re.findall(r"(vlcache:\w+)\{([^}]*)\}", query)
        assert len(asked) == query.count("vlcache:"), query
        for name, selectors in asked:
            labels = {*found.labels(name), "instance", "job"}  # Prometheus adds these two
            missing = {*grouped, *re.findall(r"(\w+)=", selectors)} - labels
            assert not missing, (query, missing)


def test_an_emptied_cache_shows_at_once(ours_tenth: Any) -> None:
    server = ours_tenth
    server.flush()
    found = scrape_when(server, "vlcache:cells_used", 0)
    assert found.total("vlcache:cells_free") == found.total("vlcache:cells_total")
    assert found.total("vlcache:cells_tree") == 0


def test_nothing_without_the_flag(limited: Any) -> None:
    assert httpx.get(f"{limited.url}/metrics", timeout=30).status_code == 404
