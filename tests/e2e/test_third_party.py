"""The package of examples/third_party_policy, built and installed as users would, chosen by name on a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest


def run(*command: str, **options: Any) -> str:
    """What the command prints; its errors fail the test."""
    ran = subprocess.run(command, capture_output=True, text=True, **options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_command_line_knows_it(installed: dict[str, str]) -> None:
    text = run(sys.executable, "-m", "vlcache_sgl.cli.main", "policies", "edges", env={**os.environ, **installed})
    for word in ("policy edges", "edges x uniform", "power", "vlcache-edges 0.1.0"):
        assert word in text


def test_a_server_compresses_with_it(foreign: Any, picture: Any) -> None:
    """Its name is all that vlcache-sgl is told."""
    server, drawn = foreign, picture(8500, 24, 24)
    before = server.settled()
    assert before["policy"] == "edges:power=2"
    answer = server.ask(drawn.questions[0].text, drawn.image, return_meta_info=True)
    after = server.settled()
    assert answer.completion_tokens > 0
    assert after["requests_compressed"] == before["requests_compressed"] + 1
    assert after["policy_failures"] == before["policy_failures"]
    seen, kept = (after[key] - before[key] for key in ("cells_seen", "cells_kept"))
    layers, front = len(answer.report["kept_tokens_per_layer"]), answer.report["front_tokens"]
    whole = layers * front  # what stands in front of the image stays
    assert kept == whole + round(0.2 * (seen - whole))
    # Beside the built-in ones, in a request's choice too.
    server.ask(drawn.questions[0].text, drawn.image, custom_params={"kv_policy": "scorer=edges,allocator=vlcache"})
    server.ask(drawn.questions[0].text, drawn.image, custom_params={"kv_policy": "snapkv"})
    after = server.settled()
    assert after["requests_compressed"] == before["requests_compressed"] + 3
    assert after["policy_failures"] == before["policy_failures"]
    server.flush()
    assert server.settled()["cells_used"] == 0
    server.assert_alive()


@pytest.mark.parametrize(("rows", "columns"), [(16, 24), (24, 16)])
def test_a_policy_sees_the_grid_of_the_image(foreign: Any, picture: Any, rows: int, columns: int) -> None:
    """`center` keeps text and what lies nearest to the middle; on any other grid those would be other tokens."""
    server, drawn = foreign, picture(8501, rows, columns)
    params = {"kv_policy": "center", "kv_report": "positions"}
    answer = server.ask(drawn.questions[0].text, drawn.image, custom_params=params, return_meta_info=True)
    (run,) = answer.report["vision"]
    place = np.arange(rows * columns)
    down, across = (place // columns + 0.5) / rows - 0.5, (place % columns + 0.5) / columns - 0.5
    distance = np.hypot(down, across)
    for layer in answer.report["kept_positions"]:
        kept = np.isin(place + run["begin"], layer)
        text = len(layer) - int(kept.sum())
        assert text == answer.report["prompt_tokens"] - rows * columns
        assert 0 < kept.sum() < kept.size
        assert distance[kept].max() <= distance[~kept].min() + 1e-6
