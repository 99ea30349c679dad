"""What we take for granted of FlashInfer, checked against the installed one: without a GPU, so nothing is launched."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from provider_bench import StandIn, use_flashinfer_stand_in

from vlcache_kernels.attention_schedule import PLAN_NUMBERS, ScheduleLayout, write_schedules
from vlcache_sgl.attention import flashinfer_kernels
from vlcache_sgl.attention.flashinfer_kernels import FlashInferKernels

BYTES = 1 << 18
CORES = 132

PLANNER = """
#include <algorithm>
#include <cstring>
using std::max; using std::min;
#define __grid_constant__
#define FLASHINFER_POS_ENC_CUH_
namespace flashinfer { enum class PosEncodingMode { kNone }; }
#include <flashinfer/attention/scheduler.cuh>
extern "C" int plan(int* starts, int* keys, int rows, int sequences, int heads, int kv_heads, int dim, int graph,
                    int whole, void* out, long bytes, long* numbers) {
  flashinfer::PrefillPlanInfo info;
  auto status = flashinfer::PrefillPlan<int>(reinterpret_cast<void*>(64), 1l << 40, out, out, bytes, info, starts, keys,
      rows, sequences, heads, kv_heads, dim, dim, 1, graph, 2, -1, -1, whole, 0, 0, nullptr, 2);
  auto found = info.ToVector();
  std::copy(found.begin(), found.end(), numbers);
  return status == cudaSuccess ? int(found.size()) : -1;
}
extern "C" {
cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 132 : which == cudaDevAttrComputeCapabilityMajor ? 9
      : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448 : 0;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  if (to != from) memcpy(to, from, size);
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "pretended"; }
}
"""
"""FlashInfer's planner is host code: compiled for the CPU, with an H100's properties."""

Planner = Callable[..., tuple[list[int], torch.Tensor]]


def folder() -> Path:
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        pytest.skip("FlashInfer is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """FlashInfer's own planner."""
    include, cuda = folder() / "data/include", folder().parent / "nvidia/cu13/include"
    compiler = shutil.which("g++")
    if compiler is None or not (cuda / "cuda_runtime_api.h").exists():
        pytest.skip("needs g++ and CUDA's headers")
    work = tmp_path_factory.mktemp("planner")
    (work / "plan.cpp").write_text(PLANNER)
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-Wl,-Bsymbolic", f"-I{include}", f"-I{cuda}"]
    options += [f"-I{cuda}/cccl", f"-I{folder()}/data/spdlog/include"]
    done = subprocess.run(
        [compiler, *options, work / "plan.cpp", "-o", work / "plan.so"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    library = ctypes.CDLL(str(work / "plan.so"))

    def plan(
        starts: list[int], keys: list[int], heads: int, kv_heads: int, *, graph: bool, whole: bool = False
    ) -> tuple[list[int], torch.Tensor]:
        out, numbers = torch.zeros(BYTES, dtype=torch.uint8), (ctypes.c_long * PLAN_NUMBERS)()
        array = ctypes.c_int * len(starts)
        found = library.plan(
            array(*starts),
            array(*keys),
            starts[-1],
            len(starts) - 1,
            heads,
            kv_heads,
            128,
            graph,
            whole,
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_long(BYTES),
            numbers,
        )
        assert found == PLAN_NUMBERS
        return list(numbers), out

    return plan


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_schedules_are_flashinfers_own_byte_for_byte(planner: Planner, decode: bool) -> None:
    """Whatever the lengths: a plan for so many sequences and rows says where, and we write what FlashInfer would."""
    rng = random.Random(decode)
    for _ in range(60):
        kv_heads, group, sequences = rng.choice([1, 2, 4, 8]), rng.choice([1, 4, 7, 8]), rng.randint(1, 90)
        counts = [1 if decode else rng.randint(1, 40) for _ in range(sequences)]
        lengths = [rng.choice([0, 1, 5, 128, 129, 1000, 7000, 60000]) for _ in counts]
        starts, keys = [0, *accumulate(counts)], [0, *accumulate(lengths)]
        want_numbers, want = planner(starts, keys, group * kv_heads, kv_heads, graph=True)
        numbers, _ = planner(starts, [0] * (sequences + 1), group * kv_heads, kv_heads, graph=True)
        assert numbers == want_numbers, "where a schedule lies must not depend on lengths"
        layout = ScheduleLayout.of(numbers, group, 2 * CORES // kv_heads)
        got = torch.zeros(1, BYTES, dtype=torch.uint8)
        write_schedules(torch.tensor([keys], dtype=torch.int32), torch.tensor(starts, dtype=torch.int32), layout, got)
        assert torch.equal(got[0], want)
        assert not want[layout.nbytes :].any(), "a schedule is larger than we take it for"


def test_the_stand_in_lays_out_what_flashinfer_does(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the provider see FlashInfer through a stand-in: its numbers are FlashInfer's."""
    monkeypatch.setattr(flashinfer_kernels, "BLOCKS_PER_CORE", 2 * CORES)
    empty = torch.zeros(0, dtype=torch.uint8)
    for counts in ([1] * 5, [1, 30, 7], [200]):
        starts = [0, *accumulate(counts)]
        tensor = torch.tensor(starts, dtype=torch.int32)
        for graph, whole in ((True, False), (False, True)):
            numbers, _ = planner(starts, starts, 28, 4, graph=graph, whole=whole)
            rest = (1, graph, 128, 128, False, -1, -1, whole, 0, 0)
            found = StandIn().plan(
                empty, empty, empty, tensor, tensor, tensor.diff(), starts[-1], len(counts), 28, 4, *rest
            )
            known = range(PLAN_NUMBERS) if graph else (0, 1, 3, 4, 5, 6, 8, 9, 13, 14)
            # 10 and 11 lie in the workspace of partial outputs, which the stand-in has not.
            assert [found[i] for i in known if i not in (10, 11)] == [numbers[i] for i in known if i not in (10, 11)]


def test_a_plan_without_cut_keys_does_not_depend_on_them(planner: Planner) -> None:
    starts = [0, 900, 1000]
    one, two = ([0, 900, 1000], [0, 50_000, 50_001])
    first, second = (planner(starts, keys, 28, 4, graph=False, whole=True) for keys in (one, two))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_arguments_are_those_of_the_installed_version() -> None:
    """By order, as we hand them over."""
    tree = ast.parse((folder() / "prefill.py").read_text())
    maker = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "get_batch_prefill_module")
    names = {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.walk(maker)
        if isinstance(node, ast.FunctionDef) and node.name in ("paged_run", "ragged_run")
    }
    unused = ["maybe_custom_mask", "maybe_mask_indptr", "maybe_alibi_slopes", "maybe_prefix_len_ptr"]
    unused += ["maybe_token_pos_in_items_ptr", "maybe_max_item_len_ptr"]
    flags = ["mask_mode", "layout", "window_left", "enable_pdl"]
    assert names["paged_run"][:31] == [
        *("float_workspace_buffer", "int_workspace_buffer", "plan_info_vec", "q", "paged_k_cache", "paged_v_cache"),
        *("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "o", "maybe_lse"),
        *(*flags, *unused, "logits_soft_cap", "sm_scale", "scale_q", "scale_k", "scale_v", "rope_scale", "rope_theta"),
        *("token_pos_in_items_len", "workspace_size"),
    ]
    assert names["ragged_run"][:25] == [
        *("float_workspace_buffer", "int_workspace_buffer", "plan_info_vec", "q", "k", "v", "qo_indptr", "kv_indptr"),
        *("o", "maybe_lse", *flags, *unused, "logits_soft_cap", "sm_scale", "rope_scale", "rope_theta"),
        "token_pos_in_items_len",
    ]
    source = (folder() / "data/csrc/batch_prefill.cu").read_text()
    signature = re.search(r"BatchPrefillWithKVCachePlan\((.*?)\)", source, re.DOTALL)
    assert signature is not None
    assert [part.split("=")[0].split()[-1] for part in signature[1].split(",")] == [
        *("float_workspace_buffer", "int_workspace_buffer", "page_locked_int_workspace_buffer", "qo_indptr"),
        *("kv_indptr", "kv_len_arr", "total_num_rows", "batch_size", "num_qo_heads", "num_kv_heads", "page_size"),
        *("enable_cuda_graph", "head_dim_qk", "head_dim_vo", "causal", "window_left", "fixed_split_size"),
        *("disable_split_kv", "num_colocated_ctas", "uniform_q_len"),
    ]


def test_a_schedule_is_not_overwritten_before_it_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans go to the device from pinned memory: a buffer is taken again when its event has passed."""
    module = use_flashinfer_stand_in(monkeypatch)
    events: list[Any] = []

    def record(device: torch.device) -> Any:
        event = SimpleNamespace(passed=False)
        event.query = lambda: event.passed
        events.append(event)
        return event

    staged: list[int] = []
    plan = module.plan
    monkeypatch.setattr(module, "plan", lambda *given: (staged.append(given[2].data_ptr()), plan(*given))[1])
    monkeypatch.setattr(flashinfer_kernels, "passed_event", record)
    kernels = FlashInferKernels(4, 2, 32, torch.float32, torch.zeros(3, 2, 2, 32))
    kernels.plan_whole([3])
    kernels.plan_whole([4])
    assert staged[0] != staged[1]
    events[0].passed = True
    kernels.plan_whole([5])
    assert staged[2] == staged[0]
    kernels.plan_whole([6])
    assert staged[3] not in staged[:3]
