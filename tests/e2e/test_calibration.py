"""Weights of a model on real servers: measured beside users on the first start, found by the second, or by command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from vlcache_sgl.cli.calibrate import main
from vlcache_sgl.evaluation.calibration import PROMPTS
from vlcache_sgl.sglang_hooks.background_calibration import MAX_SECONDS
from vlcache_sgl.sglang_hooks.weight_knobs import knobs_of
from vlcache_sgl.weights import ModelWeights, cache_file, model_key, read_weights

MODEL = Path(__file__).parents[2] / "models/tinyvlm/grounded"
LAYERS, KV_HEADS = 6, 2
AUTO = ("--kv-policy", "vlcache", "--kv-budget", "0.2", "--kv-weights", "auto")
OTHERS = ModelWeights((0.5, 0.5, 0.5, 0.5, 0.5, 0.25))


@pytest.fixture(scope="module")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cached(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the weights of the model belong."""
    monkeypatch.setenv("VLCACHE_CACHE", str(cache_root))
    return cache_file(model_key(MODEL))


@pytest.fixture
def first(servers: Any, cache_root: Path, cached: Path) -> Any:
    """The first server of the model, once it has measured it."""
    server = servers.get(*AUTO, env={"VLCACHE_CACHE": str(cache_root)})
    deadline = time.monotonic() + MAX_SECONDS
    while server.kv_state()["weights"] is None:
        assert time.monotonic() < deadline, server.process.log_tail(60)
        time.sleep(0.25)
    return server


def measured_by_command(server: Any, path: Path) -> ModelWeights:
    assert main(["--base-url", server.url, "--prompts", "2", "--output", str(path)]) == 0
    return read_weights(path)


def test_the_first_start_measures_beside_its_users(first: Any, cached: Path) -> None:
    written = read_weights(cached)
    assert first.kv_state()["weights"] == written.digest
    assert first.kv_state()["fingerprint"].endswith(f"~{written.digest}")
    assert (len(written.layers), written.heads, written.model) == (LAYERS, (), model_key(MODEL))
    assert len(set(written.layers)) > 1
    assert written.measured["prompts"] == {"image": PROMPTS}
    assert first.log.count("first start of this model") == 1
    assert f"weights {written.digest}): {cached}" in first.log
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    assert first.settled()["cells_requests"] == 0
    first.assert_alive()


def test_what_was_compressed_before_is_not_found_after(first: Any, picture: Any) -> None:
    """What the background does at its end, done once more: other weights, other prefixes."""
    drawn = picture(7960, 16, 16, 4)
    tokens = drawn.num_image_tokens

    def cached_tokens(question: int) -> int:
        options = {"max_tokens": 4, "custom_params": {"kv_share": "policy"}}
        return first.ask(drawn.questions[question].text, drawn.image, **options).cached_tokens  # type: ignore[no-any-return]

    def change(numbers: dict[str, float]) -> Any:
        return httpx.post(f"{first.url}/set_internal_state", json={"server_args": numbers}, timeout=60).json()

    assert [cached_tokens(0) >= tokens, cached_tokens(1) >= tokens] == [False, True]
    before = first.kv_state()["weights"]
    assert change(knobs_of(ModelWeights((0.5, 0.5)))) == [False], "weights of another model"
    assert first.kv_state()["weights"] == before
    assert cached_tokens(2) >= tokens
    assert change(knobs_of(OTHERS)) == [True]
    assert first.kv_state()["weights"] == OTHERS.digest
    assert [cached_tokens(0) >= tokens, cached_tokens(1) >= tokens] == [False, True]
    assert change(knobs_of(read_weights(cache_file(model_key(MODEL))))) == [True]
    assert cached_tokens(3) >= tokens, "what the weights of before had compressed is there again"
    first.flush()
    assert first.settled()["cells_used"] == 0
    first.assert_alive()


def test_by_command_layers_without_head_cells(first: Any, tmp_path: Path) -> None:
    weights = measured_by_command(first, tmp_path / "layers.json")
    assert (len(weights.layers), weights.heads) == (LAYERS, ())
    assert weights.model == model_key(MODEL)


def test_the_second_start_finds_them(servers: Any, first: Any, cache_root: Path, cached: Path, tmp_path: Path) -> None:
    """With cells per head here, which a command then measures; `first` has been there before."""
    second = servers.get(*AUTO, "--kv-head-cells", env={"VLCACHE_CACHE": str(cache_root)})
    written = read_weights(cached)
    assert second.kv_state()["weights"] == written.digest
    assert "first start of this model" not in second.log
    weights = measured_by_command(second, tmp_path / "heads.json")
    assert [len(heads) for heads in weights.heads] == [KV_HEADS] * LAYERS
    assert len(weights.layers) == LAYERS
    assert read_weights(cached) == written, "--output is where it goes"
