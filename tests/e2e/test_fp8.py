"""`--kv-cache-dtype fp8_e4m3|fp8_e5m2` on real servers: cells of one byte per number, on the device and in host memory.

Stock SGLang serves these types on a CPU too, so that budget 1.0 is compared with it token by token.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlcache_sgl.cli.plan import main as plan

BUNDLED = Path(__file__).parents[2] / "models/tinyvlm/grounded"
LAYERS, KV_HEADS, HEAD_DIM = 6, 2, 32
NUMBERS = 2 * KV_HEADS * HEAD_DIM
"""K and V of one token in one layer."""
POLICY = ("--kv-policy", "vlcache", "--kv-budget", "0.1", "--enable-metrics")
E4M3, E5M2 = ("--kv-cache-dtype", "fp8_e4m3"), ("--kv-cache-dtype", "fp8_e5m2")


@pytest.fixture
def narrow(servers: Any) -> Any:
    server = servers.get(*POLICY, *E4M3)
    server.flush()
    return server


def options(tokens: int = 6, **params: Any) -> dict[str, Any]:
    return {"max_tokens": tokens, "return_meta_info": True, "custom_params": params}


def test_sizes_are_of_one_byte(narrow: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In `/server_info`, and in the pool, which is as large as `vlcache plan` says."""
    state = narrow.settled()
    assert state["bytes_per_cell"] == NUMBERS
    assert state["host_bytes_per_token"] == LAYERS * NUMBERS
    assert narrow.process.server_info()["kv_cache_dtype"] == "fp8_e4m3"
    arguments = ["--max-total-tokens", "65536", "--dtype", "float32", "--device", "cpu", "--kv-cache-dtype", "fp8_e4m3"]
    host = f"{state['host_tokens_total'] * LAYERS * NUMBERS}B"
    assert plan(["--model", str(BUNDLED), *arguments, "--host-memory", host, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["token_bytes"] == LAYERS * NUMBERS
    (_, tenth) = planned["rows"]
    assert state["physical_tokens_total"] == tenth["physical_tokens"]
    assert state["cells_total"] == tenth["physical_tokens"] * LAYERS


def test_answers_are_right(narrow: Any, picture: Any) -> None:
    right = 0
    for seed in range(70_000, 70_003):
        drawn = picture(seed, 24, 24)
        for question in drawn.questions:
            answer = narrow.ask(question.text, drawn.image, **options())
            right += answer.text.strip() == question.answer
        assert answer.report["shared_tokens"] == answer.cached_tokens >= drawn.num_image_tokens
    assert right >= 11
    assert narrow.settled()["host_tokens_used"] >= 3 * 24 * 24


def test_every_question_is_answered_as_if_alone(narrow: Any, an_ask: Any, picture: Any) -> None:
    """Policies that read attention, keys and values: from cells, from host memory, and from the chunk itself alike."""
    drawn = picture(70_100, 20, 20)
    policies = ("vlcache", "snapkv:window=8", "keydiff", "vlcache:density")
    asked = [
        (question.text, {"kv_policy": policy, "kv_budget": budget})
        for policy, budget in zip(policies, (0.1, 0.05, 0.3, 0.2), strict=True)
        for question in drawn.questions
    ]
    shared = narrow.ask_all([an_ask(text, (drawn.image,), options(**params)) for text, params in asked], at_once=4)
    alone = narrow.ask_all(
        [an_ask(text, (drawn.image,), options(kv_share="off", **params)) for text, params in asked], at_once=4
    )
    assert [answer.text for answer in shared] == [answer.text for answer in alone]
    assert sum(answer.cached_tokens >= drawn.num_image_tokens for answer in shared) >= len(asked) - 4
    assert not any(answer.cached_tokens >= drawn.num_image_tokens for answer in alone)
    narrow.flush()
    state = narrow.settled()
    assert state["cells_used"] == state["host_tokens_used"] == state["policy_failures"] == 0
    assert state["integrity"] == []
    narrow.assert_alive()


def kept_bytes_per_token(server: Any, drawn: Any) -> float:
    """What a prompt holds on the device behind its prefill, over its tokens."""
    server.flush()
    before = server.settled()
    answer = server.ask(drawn.questions[0].text, drawn.image, **options(1, kv_share="policy"))
    state = server.settled()
    held = (state["cells_used"] - before["cells_used"]) * state["bytes_per_cell"]
    return float(held / answer.prompt_tokens)


def test_bytes_per_token(narrow: Any, picture: Any) -> None:
    """A tenth of the tokens at half of the bytes; what is in front of the image stays whole."""
    held = kept_bytes_per_token(narrow, picture(70_200, 32, 32))
    wide = LAYERS * NUMBERS * 2
    assert 0.05 * wide < held < 0.056 * wide


@pytest.mark.slow
def test_bytes_per_token_against_bfloat16(servers: Any, narrow: Any, picture: Any) -> None:
    """The figure of the README, from two servers."""
    drawn = picture(70_200, 32, 32)
    plain = servers.get("--kv-policy", "vlcache", "--kv-budget", "1.0", "--dtype", "bfloat16")
    whole, tenth = kept_bytes_per_token(plain, drawn), kept_bytes_per_token(narrow, drawn)
    print(f"bfloat16 at budget 1.0: {whole:.1f} bytes per token; fp8_e4m3 at 0.1: {tenth:.1f}; {whole / tenth:.1f}x")
    assert whole == LAYERS * NUMBERS * 2
    assert 17.5 < whole / tenth < 20


def assert_stock_tokens(stock: Any, ours: Any, picture: Any, tolerance: float = 2e-2) -> None:
    """Greedy tokens and their probabilities, of prompts in several chunks, shared ones and batches."""
    for seed, size in ((70_300, 16), (70_301, 32)):
        drawn = picture(seed, size, size)
        for question in drawn.questions:
            request = {"max_tokens": 8, "logprobs": True}
            theirs = stock.ask(question.text, drawn.image, **request)
            mine = ours.ask(question.text, drawn.image, **request, custom_params={"kv_budget": 1.0})
            assert (mine.prompt_tokens, mine.cached_tokens) == (theirs.prompt_tokens, theirs.cached_tokens)
            (a,), (b,) = theirs.choices, mine.choices
            assert b.tokens == a.tokens
            assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("flags", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_budget_one_is_stock(servers: Any, picture: Any, flags: tuple[str, ...]) -> None:
    stock, ours = servers.get(*flags), servers.get(*POLICY, *flags)
    assert_stock_tokens(stock, ours, picture)
    ours.assert_alive()


@pytest.fixture(scope="session")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with scales of its keys and values, as compressed-tensors writes them."""
    folder = shutil.copytree(BUNDLED, tmp_path_factory.mktemp("scaled") / "model")
    config = json.loads((folder / "config.json").read_text())
    kind = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": kind,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.self_attn.k_proj.weight"))
    for layer in range(LAYERS):
        attention = name.replace("layers.0.", f"layers.{layer}.").removesuffix(".k_proj.weight")
        weights[f"{attention}.k_scale"] = torch.tensor(0.25 * 2**layer)
        weights[f"{attention}.v_scale"] = torch.tensor(0.125)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_scales_of_a_checkpoint(servers: Any, picture: Any, scaled: Path) -> None:
    """Powers of two round alike, so that stock's plain torch, which uses no scales, gives the same tokens."""
    half = ("--dtype", "bfloat16")  # SGLang reads such checkpoints in no other
    ours = servers.get(*POLICY, *E4M3, *half, model=scaled)
    assert_stock_tokens(servers.get(*E4M3, *half), ours, picture, tolerance=5e-2)
    assert ours.settled()["policy_failures"] == 0
