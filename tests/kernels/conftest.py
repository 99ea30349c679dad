"""Kernel tests run compiled where there is a CUDA device and in Triton's interpreter where there is none."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
import torch

OPS = (
    "attention_stats",
    "residency_index",
    "select",
    "arena_write",
    "attention_schedule",
    "copy_cells",
    "sketch_scores",
)


def import_interpreted() -> None:
    """Import Triton and our kernels in interpreter mode, and leave no trace in the environment.

    The mode is fixed when a function is decorated, Triton's own library included.  Another test module may have
    imported Triton before (SGLang does): then it is imported once more, beside the copy that the others hold.  The
    variable is taken back, because servers that other tests start would inherit it.
    """
    before = os.environ.get("TRITON_INTERPRET")
    loaded = sys.modules.get("triton")
    if loaded is not None and before != "1":
        for name in [name for name in sys.modules if name == "triton" or name.startswith("triton.")]:
            if not name.startswith("triton._C"):  # a C extension cannot be loaded twice
                del sys.modules[name]
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import_module("triton")
        import_module("triton.experimental.gluon")  # the interpreter imports it at the first launch
        for op in OPS:
            import_module(f"vlcache_kernels.{op}.triton")
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


COMPILED = torch.cuda.is_available()
if not COMPILED:
    import_interpreted()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", help="i/n: only every n-th kernel test from the i-th on; for several processes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard = config.getoption("--shard", default=None)  # unknown where this file is loaded late
    if shard:
        which, count = (int(part) for part in shard.split("/"))
        items[:] = items[which::count]
    for item in items:
        if item.get_closest_marker("gpu") and not COMPILED:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        # The interpreter computes masked lanes in numpy, which warns of the infinities that `where` then drops.
        item.add_marker(pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if COMPILED else "cpu")


@pytest.fixture(scope="session")
def compiled() -> bool:
    """False where the kernels are interpreted: then keep sizes small."""
    return COMPILED


@pytest.fixture(scope="session")
def vast(device: torch.device) -> Callable[..., torch.Tensor]:
    """``vast(*shape)``: zeros in bfloat16, more than fit 32-bit offsets; on a CPU only what is touched takes memory."""

    def make(*shape: int) -> torch.Tensor:
        assert math.prod(shape) > 2**31
        if device.type == "cpu":
            return torch.from_numpy(np.zeros(shape, dtype=np.int16)).view(torch.bfloat16)
        if torch.cuda.mem_get_info()[0] < 6 * 2**30:
            pytest.skip("needs 6 GiB of free device memory")
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)

    return make


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` returns NaN or a large negative number: an output that no program writes shows."""
    real = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = real(*args, **kwargs)  # type: ignore[call-overload]
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(-(2**30) if tensor.dtype in (torch.int32, torch.int64) else 1)

    monkeypatch.setattr(torch, "empty", empty)
