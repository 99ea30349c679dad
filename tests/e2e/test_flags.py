"""Wrong flags: one line on stderr and exit code 2 before the model loads.  Wrong requests: 4xx, the server lives."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from described import describe

from vlcache_sgl.config import FLAGS, ConfigError
from vlcache_sgl.sglang_hooks.compat import reads_no_images
from vlcache_sgl.sglang_hooks.flags import _our_flags, _serve_arguments

MODEL = Path(__file__).parents[2] / "models/tinyvlm/grounded"
OTHER_WEIGHTS = Path(__file__).parents[2] / "models/smollm2/weights.json"
POLICY = ("--kv-policy", "vlcache")
CONSOLE_SCRIPT = str(Path(sys.executable).with_name("sglang"))

WRONG = {
    "unknown policy": (("--kv-policy", "nope"), ["--kv-policy", "nope", "vlcache"]),
    "unknown parameter": (("--kv-policy", "vlcache:nope=1"), ["--kv-policy", "nope"]),
    "parameter without value": (("--kv-policy", "vlcache:protect="), ["--kv-policy", "protect"]),
    "unknown scorer": (("--kv-policy", "scorer=nope,allocator=uniform"), ["--kv-policy", "nope"]),
    "budget zero": ((*POLICY, "--kv-budget", "0"), ["--kv-budget", "0"]),
    "budget negative": ((*POLICY, "--kv-budget=-0.5"), ["--kv-budget", "-0.5"]),
    "budget above one": ((*POLICY, "--kv-budget", "1.5"), ["--kv-budget", "1.5"]),
    "budget no number": ((*POLICY, "--kv-budget", "much"), ["--kv-budget", "much"]),
    "scope": ((*POLICY, "--kv-scope", "audio"), ["--kv-scope", "audio"]),
    "min tokens": ((*POLICY, "--kv-min-tokens", "-1"), ["--kv-min-tokens", "-1"]),
    "share": ((*POLICY, "--kv-share", "everybody"), ["--kv-share", "everybody", "exact"]),
    "exact without host memory": (
        (*POLICY, "--kv-share", "exact", "--kv-host-memory", "off"),
        ["--kv-share exact needs host memory"],
    ),
    "nearest policy": (("--kv-policy", "vl-cache"), ["did you mean 'vlcache'?"]),
    "nearest scorer": (("--kv-policy", "scorer=SnapKV,allocator=uniform"), ["did you mean 'snapkv'?"]),
    "nearest allocator": (("--kv-policy", "scorer=snapkv,allocator=unifrom"), ["did you mean 'uniform'?"]),
    "nearest parameter": (("--kv-policy", "snapkv:windw=8"), ["did you mean 'window'?"]),
    "allowed policy that is none": (
        (*POLICY, "--kv-allow-policies", "knorm,nosuch"),
        ["--kv-allow-policies", "nosuch", "knorm"],
    ),
    "allowed policy misspelt": ((*POLICY, "--kv-allow-policies", "snapvk"), ["did you mean 'snapkv'?"]),
    "least budget above the default": (
        (*POLICY, "--kv-budget", "0.1", "--kv-budget-min", "0.5"),
        ["--kv-budget-min 0.5", "--kv-budget 0.1"],
    ),
    "head cells that nothing uses": (
        ("--kv-policy", "snapkv", "--kv-head-cells", "--kv-allow-policies", "none"),
        ["--kv-head-cells", "--kv-allow-policies"],
    ),
    "no such weights": ((*POLICY, "--kv-weights", "/nowhere.json"), ["--kv-weights", "/nowhere.json"]),
    "weights of another model": (
        (*POLICY, "--kv-weights", str(OTHER_WEIGHTS)),
        ["--kv-weights", OTHER_WEIGHTS.name, "has 30 layers, the model has 6"],
    ),
    "budget without policy": (("--kv-budget", "0.1"), ["--kv-budget", "--kv-policy"]),
}
"""Flags, and what the one line must name."""

REFUSED = {
    "page size": (("--page-size", "16"), ["--page-size"]),
    "pipeline parallel": (("--pp-size", "2"), ["--pp-size"]),
    "hierarchical cache": (("--enable-hierarchical-cache",), ["--enable-hierarchical-cache"]),
    "PD disaggregation": (("--disaggregation-mode", "prefill"), ["--disaggregation-mode"]),
    "speculative decoding": (("--speculative-algorithm", "NGRAM"), ["--speculative-algorithm"]),
    "quantized KV": (("--kv-cache-dtype", "mxfp8"), ["--kv-cache-dtype"]),
    "attention over data": (("--attn-dp-size", "2", "--tp-size", "2"), ["--attn-dp-size 2"]),
    "canary": (("--kv-canary", "raise"), ["--kv-canary raise"]),
    "encoder alone": (("--encoder-only",), ["--encoder-only:"]),
    "items of one prompt apart": (("--enable-mis",), ["--enable-mis:"]),
    "another layout of the pool": (("--enable-page-major-kv-layout",), ["--enable-page-major-kv-layout"]),
    "external store": (("--enable-unified-cache-external-linker",), ["--enable-unified-cache-external-linker"]),
}
"""Architecture, section 4, rule 10: what is not served compressed is refused, naming flag and reason."""


REFUSED_MODELS = {"llama4": "chunked attention", "minimax_m3": "sparse attention", "mllama": "cross-attention"}
"""Of `tests/support/described.py`, and the kind that the line must name: there are no weights that could be loaded."""


def launch_all(cases: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Exit code and output of the server with each set of flags."""
    script = Path(__file__).parent / "flag_cases.py"
    arguments = [["--model-path", str(MODEL), *case] for case in cases]
    ran = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(arguments), capture_output=True, text=True, timeout=550
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(ran.stdout.splitlines()[-1])
    return results


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    cases = {name: flags for name, (flags, _) in WRONG.items()}
    for name in REFUSED_MODELS:
        cases[name] = (*POLICY, "--model-path", str(describe(name, tmp_path_factory.mktemp("models") / name)))
    cases |= {name: (*POLICY, *flags) for name, (flags, _) in REFUSED.items()}
    cases["help"] = ("--help",)
    return dict(zip(cases, launch_all(list(cases.values())), strict=True))


@pytest.mark.parametrize("name", [*WRONG, *REFUSED])
def test_wrong_flags_cost_one_line_and_code_2(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    outcome, words = outcomes[name], {**WRONG, **REFUSED}[name][1]
    assert outcome["code"] == 2, outcome["err"][-2000:]
    lines = outcome["err"].strip().splitlines()
    assert len(lines) == 1, outcome["err"][-2000:]
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(("name", "kind"), REFUSED_MODELS.items(), ids=REFUSED_MODELS.keys())
def test_a_model_is_refused_before_it_is_loaded(outcomes: dict[str, dict[str, Any]], name: str, kind: str) -> None:
    outcome = outcomes[name]
    lines = [line for line in outcome["err"].splitlines() if "error" in line.lower()]
    assert outcome["code"] == 2, outcome["err"][-2000:]
    assert [kind in line for line in lines] == [True], outcome["err"][-2000:]
    assert "Traceback" not in outcome["err"]


def test_help_has_a_group_of_our_flags(outcomes: dict[str, dict[str, Any]]) -> None:
    text = outcomes["help"]["out"]
    assert outcomes["help"]["code"] == 0
    for flag in ("--kv-policy", "--kv-budget", "--kv-scope", "--kv-min-tokens", "--kv-share", "--kv-host-memory"):
        assert f"  {flag}" in text


@pytest.mark.parametrize("start", [("-m", "sglang.launch_server"), (CONSOLE_SCRIPT, "serve")], ids=["module", "script"])
def test_a_real_launch_refuses_before_the_heavy_imports(start: tuple[str, ...]) -> None:
    """Without the shortcut of `flag_cases.py`, as a user would type it; the interpreter writes down what it imports."""
    command = [sys.executable, "-X", "importtime", *start, "--model-path", "nowhere", "--kv-policy", "vl-cache"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2, ran.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    (message,) = (line for line in ran.stderr.splitlines() if not line.startswith("import time:"))
    assert "did you mean 'vlcache'?" in message
    assert "vlcache_sgl.config" in imported
    assert not {"sglang.srt.server_args", "transformers", "sglang.srt.entrypoints.engine"} & imported


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["/bin/sglang", "serve", "--a"], ["python", "/bin/sglang", "serve", "--a"], ["--a"]),
        (["-m", "--a"], ["python", "-m", "sglang.launch_server", "--a"], ["--a"]),
        (["-m", "--a"], ["python", "-m", "pytest", "--a"], None),
        (["/bin/sglang", "generate", "--a"], ["python", "/bin/sglang", "generate", "--a"], None),
        (["serve.py", "--kv-policy", "x"], ["python", "serve.py", "--kv-policy", "x"], None),
    ],
)
def test_only_the_command_line_of_a_server_is_read_early(argv: Any, original: Any, expected: Any) -> None:
    assert _serve_arguments(argv, original) == expected


def test_early_reading_takes_flags_as_argparse_does() -> None:
    values = _our_flags(["--model-path", "m", "--kv-sco", "all", "--kv-cache-dtype", "fp8_e4m3", "--kv-head-cells"])
    assert {name: value for name, value in values.items() if value is not None} == {
        "kv_scope": "all",
        "kv_head_cells": True,
    }
    with pytest.raises(ConfigError, match=r"--kv-polcy \(did you mean --kv-policy\?\)"):
        _our_flags(["--kv-polcy=vlcache"])
    with pytest.raises(ConfigError, match="--kv-policy: expected one argument"):
        _our_flags(["--kv-policy"])


def test_no_flag_of_sglang_passes_for_a_misspelt_one_of_ours() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    ours = {flag.name for flag in FLAGS}
    _our_flags([name for name in parser._option_string_actions if name.startswith("--kv-") and name not in ours])


def test_a_model_that_reads_no_images_needs_scope_all() -> None:
    assert reads_no_images({"architectures": ["LlamaForCausalLM"]})
    assert not reads_no_images({"architectures": ["Qwen2_5_VLForConditionalGeneration"]})
    assert not reads_no_images({})


BAD_REQUESTS: dict[str, dict[str, Any]] = {
    "not a picture": {"image": "data:image/png;base64,bm90IGEgcGljdHVyZQ=="},
    "cut off": {"image": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAoAAAAK"},
    "no such file": {"image": "file:///nowhere/picture.png"},
    "a folder": {"image": "file:///"},
    "unknown policy": {"custom_params": {"kv_policy": "nope"}},
    "policy of the wrong type": {"custom_params": {"kv_policy": 3}},
    "budget out of range": {"custom_params": {"kv_budget": 2.5}},
    "budget no number": {"custom_params": {"kv_budget": "much"}},
    "share": {"custom_params": {"kv_share": "everybody"}},
    "share of the wrong type": {"custom_params": {"kv_share": ["off"]}},
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request_is_a_client_error(ours_tenth: Any, name: str) -> None:
    fields = dict(BAD_REQUESTS[name])
    content: Any = "red K?"
    if image := fields.pop("image", None):
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": content}]
    body = {"model": "default", "messages": [{"role": "user", "content": content}], "max_tokens": 2, **fields}
    reply = httpx.post(f"{ours_tenth.url}/v1/chat/completions", json=body, timeout=60)
    assert 400 <= reply.status_code < 500, reply.text
    assert reply.json()
    assert ours_tenth.ask("red K?", max_tokens=1).completion_tokens == 1
    ours_tenth.flush()
    assert ours_tenth.settled()["cells_used"] == 0
