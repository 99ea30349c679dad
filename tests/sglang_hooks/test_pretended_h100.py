"""A server on an H100 that is not there: which kernels SGLang chooses, with a policy and without, and that all of our
patches fit what SGLang loads on such a machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.models.make_model import QWEN_7B, make_config
from benchmarks.models.make_tiny import make_tiny

SCRIPT = Path(__file__).parents[1] / "support/pretend_h100.py"
DRIVER = """
CtxFromGreenCtx CtxGetDevice CtxGetId CtxPopCurrent_v2 CtxPushCurrent_v2 DeviceGet DeviceGetAttribute
DeviceGetDevResource DriverGetVersion GetErrorString GetExportTable GetProcAddress_v2 GreenCtxCreate GreenCtxDestroy
GreenCtxGetDevResource MemAddressFree MemAddressReserve MemCreate MemGetAllocationGranularity MemMap MemRelease
MemSetAccess MemUnmap PointerGetAttribute StreamCreate
"""
"""Functions of CUDA's driver that libraries of SGLang are linked against; none is called."""
NO_DEVICE = 100


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is decided for each model, and what is installed."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc")
    pytest.importorskip("sglang")
    folder = tmp_path_factory.mktemp("h100")
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int cu{name}(void) {{ return {NO_DEVICE}; }}\n" for name in DRIVER.split()))
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    models = {
        "found": make_config(folder / "model", QWEN_7B, "bfloat16"),
        "gemma4": make_tiny("gemma4", folder / "gemma4"),
    }
    done = subprocess.run(
        [sys.executable, SCRIPT, *models.values()],
        capture_output=True,
        text=True,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *answers, installed = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return dict(zip(models, answers, strict=True)) | {"installed": installed}


@pytest.fixture(scope="module")
def found(told: dict[str, Any]) -> dict[str, Any]:
    """For a Qwen2.5-VL 7B."""
    decided: dict[str, Any] = told["found"]
    return decided


def test_kernels_that_are_chosen(found: dict[str, Any]) -> None:
    """SGLang's own choice is FlashAttention 3, which reads slots; ours is FlashInfer, with recorded decode steps."""
    assert found["platform"] == "CudaSRTPlatform"
    assert found["stock"]["attention_backend"] == "fa3"
    ours = found["ours"]
    assert ours["attention_backend"] == "flashinfer"
    assert ours["page_size"] == 1
    assert ours["radix_eviction_policy"] == "slru"
    assert (ours["decode_graphs"], ours["prefill_graphs"]) == ("full", "disabled")
    assert ours["decode_sizes"] == found["stock"]["decode_sizes"] > 10
    assert ours["overlap"]


def test_windows_take_triton(told: dict[str, Any]) -> None:
    """Whatever stock chooses; decode steps are recorded."""
    ours = told["gemma4"]["ours"]
    assert (ours["attention_backend"], ours["page_size"]) == ("triton", 1)
    assert (ours["decode_graphs"], ours["prefill_graphs"]) == ("full", "disabled")


def test_patches_fit_the_modules_of_a_cuda_machine(told: dict[str, Any]) -> None:
    """All installed and verified; no model was imported before them, so none writes keys by slot."""
    assert told["installed"]["points"] > 20
    assert told["installed"]["early"] == []
    assert all(told["installed"]["models"].values()), told["installed"]["models"]
