"""`vlcache plan`: figures for models that can be served, one line for those that cannot."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from vlcache_sgl.cli.plan import main

BUNDLED = Path(__file__).parents[2] / "models/tinyvlm/grounded"
QWEN = {
    # The shape of a 7 B model: 28 layers, 4 KV heads of 128.
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
}


def config(folder: Path, **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**QWEN, **changes}))
    return str(path)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("vlcache plan: ")
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


def test_a_large_model_from_its_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = config(tmp_path)
    result = planned(
        *(capsys, "--model", model, "--gpu-memory", "141GB", "--image-tokens", "2000", "--text-tokens", "0"),
        *("--new-tokens", "100", "--budget", "0.1", "0.2", "64", "--max-running-requests", "100000"),
    )
    assert result["token_bytes"] == 28 * 2 * 4 * 128 * 2
    # 8.29 B parameters of two bytes are counted from the configuration.
    kv_bytes = result["tokens_uncompressed"] * result["token_bytes"]
    assert 0.85 * 141e9 - kv_bytes == pytest.approx(16.58e9, rel=0.01)
    stock, tenth, fifth, tokens = result["rows"]
    assert stock["requests"] == result["tokens_uncompressed"] // 2100
    assert [row["budget"] for row in result["rows"]] == ["none", "0.1", "0.2", "64"]
    assert tenth["resident_tokens"] == 200
    assert tokens["resident_tokens"] == 64
    # A request holds 300 tokens and not 2100.
    assert 6.5 < tenth["requests"] / stock["requests"] < 7.0
    assert stock["requests"] < fifth["requests"] < tenth["requests"]
    assert tenth["host_tokens"] == 2 * stock["physical_tokens"]
    assert tenth["cached_images"] == fifth["cached_images"] == tenth["host_tokens"] // 2000, "whole, in host memory"


def test_layers_with_a_window_by_hand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Gemma 4 31B: 10 layers see everything with 4 KV heads of 512, 50 see 1024 tokens with 16 heads of 256."""
    text = {
        "model_type": "gemma4_text",
        "hidden_size": 5376,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gemma4", "text_config": text}))
    asked = ("--model", str(path), "--max-total-tokens", "100000", "--image-tokens", "8192", "--text-tokens", "0")
    result = planned(capsys, *asked, "--budget", "0.1")
    full, sliding = 10 * 2 * 4 * 512 * 2, 50 * 2 * 16 * 256 * 2
    assert (full, sliding) == (81_920, 819_200)
    assert result["token_bytes"] == full + sliding
    # A tenth of 8192 tokens in layers of the first kind, 1023 tokens in those of the second.
    kept = (0.1 * 8192 * full + 1023 * sliding) / (full + sliding)
    assert result["rows"][1]["resident_tokens"] == pytest.approx(kept, abs=0.1)
    narrow = planned(capsys, *asked, "--kv-cache-dtype", "fp8_e4m3", "--budget", "0.1")
    assert narrow["token_bytes"] == (full + sliding) // 2


def test_a_large_mixture_of_experts_by_hand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Qwen3-VL-235B: 94 layers of 4 KV heads of 128."""
    text = {
        "model_type": "qwen3_vl_moe_text",
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen3_vl_moe", "text_config": text}))
    asked = ("--model", str(path), "--max-total-tokens", "100000", "--budget", "0.1")
    assert planned(capsys, *asked)["token_bytes"] == 94 * 2 * 4 * 128 * 2 == 192_512
    assert planned(capsys, *asked, "--kv-cache-dtype", "fp8_e5m2")["token_bytes"] == 96_256
    assert planned(capsys, *asked, "--tp", "4")["token_bytes"] == 48_128


def test_a_folder_and_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, "--model", str(BUNDLED), "--gpu-memory", "100MB", "--dtype", "float32")
    weights = (BUNDLED / "model.safetensors").stat().st_size
    assert result["tokens_uncompressed"] == int((85e6 - weights) / result["token_bytes"])


def test_tensor_parallel_ranks_hold_fewer_heads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ("--model", config(tmp_path), "--gpu-memory", "80GiB", "--weights", "16GB")
    one, four = (planned(capsys, *common, "--tp", tp) for tp in ("1", "4"))
    assert four["token_bytes"] * 4 == one["token_bytes"]
    assert four["tokens_uncompressed"] > 4 * one["tokens_uncompressed"]
    assert "cannot be divided" in refused(capsys, *common, "--tp", "3")
    assert "cannot be divided" in refused(capsys, *common, "--tp", "8")  # 28 heads


def test_says_what_limits(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--model", str(BUNDLED), "--max-total-tokens", "100000", "--dtype", "float32")
    assert planned(capsys, *common)["rows"][1]["limited_by"] == "memory"
    assert planned(capsys, *common, "--overcommit", "1")["rows"][1]["limited_by"] == "slots"
    limited = planned(capsys, *common, "--max-running-requests", "7")["rows"]
    assert [(row["requests"], row["limited_by"]) for row in limited] == [(7, "max-running-requests")] * 2


def test_short_prompts_are_not_compressed(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--model", str(BUNDLED), "--max-total-tokens", "9000", "--image-tokens", "100", "--text-tokens", "20")
    assert planned(capsys, *common)["rows"][1]["resident_tokens"] == 120


def test_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(BUNDLED), "--max-total-tokens", "8832", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "uncompressed" in printed
    assert "0.1" in printed
    assert "x)" in printed


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_lora_rank": 512}, "MLA"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding-window"),
        ({"layer_types": ["linear_attention"] * 28}, "needs layers of attention"),
    ],
    ids=["mla", "window", "linear"],
)
def test_models_that_the_server_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    model = config(tmp_path, **changes)
    assert reason in refused(capsys, "--model", model, "--gpu-memory", "80GB", "--weights", "16GB")


def test_requests_that_cannot_be_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pool = ("--model", str(BUNDLED), "--max-total-tokens", "1000")
    assert "does not fit" in refused(capsys, *pool, "--image-tokens", "999")
    assert "--kv-budget" in refused(capsys, *pool, "--budget", "2.5")
    assert "--kv-overcommit" in refused(capsys, *pool, "--overcommit", "0.5")
    assert "leave no KV cache" in refused(capsys, "--model", str(BUNDLED), "--gpu-memory", "5MB")
    assert "no config.json" in refused(capsys, "--model", str(tmp_path), "--gpu-memory", "80GB")
    (tmp_path / "config.json").write_text("{")
    assert "cannot read" in refused(capsys, "--model", str(tmp_path), "--gpu-memory", "80GB")
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model_of_nobody"}')
    assert "not a language model" in refused(capsys, "--model", str(tmp_path), "--gpu-memory", "80GB")


def test_the_table_is_whole_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlcache_sgl.cli.plan._WIDTH", 80)
    pool = ("--model", str(BUNDLED), "--max-total-tokens", "900000", "--max-running-requests", "7")
    assert main(pool) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    for word in ("uncompressed", "memory,", "requests", "limited", "cached", "running"):
        assert f"{word} " in printed


def test_says_what_the_limit_on_running_requests_hides(capsys: pytest.CaptureFixture[str]) -> None:
    pool = ("--model", str(BUNDLED), "--max-total-tokens", "100000", "--max-running-requests")
    stock, tenth = planned(capsys, *pool, "100")["rows"]
    assert (stock["requests"], tenth["requests"]) == (82, 100)
    assert tenth["room_for"] > 3 * stock["room_for"]
    assert main([*pool, "100"]) == 0
    printed = capsys.readouterr().out
    gain = tenth["room_for"] / stock["room_for"]
    assert f"memory has room for {tenth['room_for']} requests at once ({gain:.1f}x)" in printed
    assert "raise --max-running-requests above 100" in printed
    assert main([*pool, "100000"]) == 0
    assert "memory has room for" not in capsys.readouterr().out


def test_sizes_are_named_in_both_units(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(BUNDLED), "--max-total-tokens", "100000", "--dtype", "float32"]) == 0
    assert re.search(r"KV cache: [\d.]+ GB \([\d.]+ GiB\), ", capsys.readouterr().out)


def test_a_name_on_a_hub_that_cannot_be_reached(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens on that port; the hub's own client tried again for 40 s."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    message = refused(capsys, "--model", "nobody/has-this-model", "--gpu-memory", "80GB")
    assert time.monotonic() - started < 20  # the first import of transformers is in it
    assert "cannot be reached" in message
    assert "config.json" in message


@pytest.mark.parametrize("memory", ["", "80", "0GB", "80 parsecs"])
def test_sizes_have_a_unit(capsys: pytest.CaptureFixture[str], memory: str) -> None:
    with pytest.raises(SystemExit):
        main(["--model", str(BUNDLED), "--gpu-memory", memory])
    assert "expected a size" in capsys.readouterr().err


QWEN_27B = {
    # A dense hybrid of 27 B: 48 Gated Delta Networks and 16 layers of attention with 4 KV heads of 256.
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": {
        "model_type": "qwen3_5_text",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "vocab_size": 248320,
    },
}


def hybrid(folder: Path) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(QWEN_27B))
    return str(path)


def test_a_hybrid_has_tokens_in_a_quarter_of_its_layers_and_states_beside_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("--model", hybrid(tmp_path), "--gpu-memory", "141GB", "--weights", "54GB")
    result = planned(capsys, *arguments, "--image-tokens", "2000", "--text-tokens", "0", "--new-tokens", "100")
    assert result["token_bytes"] == 16 * 2 * 4 * 256 * 2 == 64 * 1024
    # Per linear layer 48 matrices of 128 x 128 float32, and 3 inputs of 2 x 16 x 128 + 48 x 128 channels, bfloat16.
    assert result["state_bytes"] == 48 * (48 * 128 * 128 * 4 + 3 * 10_240 * 2) == 153_944_064
    memory = 0.85 * 141e9 - 54e9
    states, cache = (result["state_slots"] + 1) * 153_944_064, result["tokens_uncompressed"] * 65_536
    assert states + cache == pytest.approx(memory, rel=1e-4)
    assert states / cache == pytest.approx(0.9, rel=0.01)
    stock, tenth = result["rows"]
    assert result["state_slots"] == 201
    assert stock["room_for"] == result["tokens_uncompressed"] // 2100 == 252
    assert stock["limited_by"] == tenth["limited_by"] == "states"
    assert stock["requests"] == tenth["requests"] == 201 // 5
    assert tenth["cached_images"] == 201
    assert main(arguments) == 0
    assert "states are what is short" in capsys.readouterr().out


def test_more_states_let_a_compressed_hybrid_run_more(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("--model", hybrid(tmp_path), "--gpu-memory", "141GB", "--weights", "54GB", "--image-tokens", "8000")
    few, many = (planned(capsys, *arguments, *more) for more in ((), ("--mamba-full-memory-ratio", "4")))
    assert many["state_slots"] > few["state_slots"]
    assert many["tokens_uncompressed"] < few["tokens_uncompressed"]
    assert many["rows"][1]["requests"] > 1.5 * few["rows"][1]["requests"]
    assert many["rows"][1]["requests"] > 2 * many["rows"][0]["requests"], "what stock SGLang has no tokens for"


def test_two_ranks_of_a_hybrid_have_half_of_its_states(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("--model", hybrid(tmp_path), "--max-total-tokens", "100000")
    one, two = (planned(capsys, *arguments, "--tp", ranks) for ranks in "12")
    assert one["state_bytes"] == 2 * two["state_bytes"]
    assert one["token_bytes"] == 2 * two["token_bytes"]
    assert one["state_slots"] is two["state_slots"] is None, "not to be known from tokens"
    assert one["rows"][1]["limited_by"] != "states"
    limited = planned(capsys, *arguments, "--max-mamba-cache-size", "20")
    assert limited["rows"][1]["requests"] == 4
    with pytest.raises(SystemExit):
        main([*arguments, "--mamba-full-memory-ratio", "0"])
    assert "expected a number above 0" in capsys.readouterr().err
