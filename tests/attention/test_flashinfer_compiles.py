"""FlashInfer's modules that we launch compile for a Hopper GPU, here without one: minutes of nvcc."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("flashinfer")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("dim", [64, 128])
def test_the_modules_compile_for_hopper(dim: int) -> None:
    """The prefill kernels in bf16, which serve decode too, with and without a mask, over cells and over new keys."""
    from benchmarks.bundle.flashinfer_modules import build_module

    library = build_module(dim)
    assert library.read_bytes()[:4] == b"\x7fELF"
