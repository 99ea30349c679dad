"""Around the providers: SGLang's batches, defaults of a CUDA machine, and when evicted cells come back."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import provider_bench as bench
import pytest
import torch
from backend_parts import layer_of_model, make_backend, make_pool

from vlcache_sgl.attention.base import Provider
from vlcache_sgl.memory.batches import Memory

provider, kernels = bench.provider, bench.kernels
LAYERS, HEADS, DIM, KV_HEADS = bench.LAYERS, bench.HEADS, bench.DIM, bench.KV_HEADS
DEVICE, DTYPE, SCALE = bench.DEVICE, bench.DTYPE, bench.SCALE
GROUPS = pytest.mark.parametrize("groups", [1, KV_HEADS], ids=["layer-cells", "head-cells"])
ALL = pytest.mark.parametrize("provider", ["torch_native", "triton", "flashinfer"], indirect=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
Make = Callable[[Memory], Provider]


@ALL
@GROUPS
def test_backend_writes_and_reads(provider: Make, groups: int, request: pytest.FixtureRequest) -> None:
    """`ResidencyBackend` with SGLang's batches: a prefill, a step without and two with recorded buffers."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    pool = make_pool(groups)
    arena = pool.arena
    table = torch.zeros(5, 64, dtype=torch.int32, device=DEVICE)
    name = request.node.callspec.params["provider"]
    backend = make_backend(name, pool, table, SimpleNamespace(observe=None, host=None))
    world = bench.Requests(groups)
    world.memory, world.residency = backend_memory(backend, table), arena.residency
    rows, lengths, slot = [2, 4], [0, 0], itertools.count(1)

    def forward(counts: list[int], mode: Any, size: int = 0) -> None:
        nonlocal lengths
        begins, lengths = lengths, [a + b for a, b in zip(lengths, counts, strict=True)]
        slots = torch.tensor([next(slot) for _ in range(sum(counts))], device=DEVICE)
        arena.residency.attach(slots)
        for row, begin, part in zip(rows, begins, torch.split(slots, counts), strict=True):
            table[row, begin : begin + len(part)] = part.int()
        world.lengths = dict(zip(rows, lengths, strict=True))
        padding = max(0, size - len(rows))
        batch = SimpleNamespace(
            forward_mode=mode,
            batch_size=len(rows) + padding,
            num_padding=padding,
            req_pool_indices=torch.tensor(rows + [0] * padding, device=DEVICE),
            out_cache_loc=slots,
            seq_lens=torch.tensor(lengths + [1] * padding, device=DEVICE),
            seq_lens_cpu=torch.tensor(lengths + [1] * padding),
            extend_prefix_lens=torch.tensor(begins, device=DEVICE),
            extend_prefix_lens_cpu=begins,
            extend_seq_lens_cpu=counts,
        )
        backend.rows = rows
        (backend.init_forward_metadata_out_graph if size else backend.init_forward_metadata)(batch)
        for number in range(LAYERS):
            layer = layer_of_model(number)
            tokens = sum(counts) + padding
            q = torch.randn(tokens, HEADS * DIM, device=DEVICE).to(DTYPE)
            k, v = (torch.randn(tokens, KV_HEADS, DIM, device=DEVICE).to(DTYPE) for _ in range(2))
            run = backend.forward_decode if mode.is_decode() else backend.forward_extend
            got = run(q, k, v, layer, batch).view(tokens, HEADS, DIM)
            assert torch.equal(world.dense(number, rows[0])[0][begins[0] :], k[: counts[0]])
            if mode.is_decode():
                world.check(got, q.view(tokens, HEADS, DIM), number, rows)
            assert not bool(arena.cells[0].any()), "the padding cell must stay zero"

    forward([5, 3], ForwardMode.EXTEND)
    forward([2, 6], ForwardMode.EXTEND)
    forward([1, 1], ForwardMode.DECODE)
    if name != "torch_native":
        backend.init_cuda_graph_state(4, 4)
        assert backend.get_cuda_graph_seq_len_fill_value() == 1
        forward([1, 1], ForwardMode.DECODE, size=4)
        forward([1, 1], ForwardMode.DECODE, size=4)
    with pytest.raises(NotImplementedError, match="sinks"):
        backend.forward_decode(None, None, None, None, None, sinks=torch.zeros(1))


def backend_memory(backend: Any, table: torch.Tensor) -> Memory:
    return Memory(backend.arena.cells, backend.arena.residency, table, backend.arena.groups)


def test_evicted_cells_come_back_behind_their_event() -> None:
    """Rule 5: handing them over does not wait; whoever needs more cells than the host knows of does."""
    from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator
    from vlcache_sgl.streams import passed_event

    pool = make_pool(1, tokens=10)
    arena = pool.arena
    allocator = VirtualSlotAllocator(pool, physical_tokens=10, need_sort=False)
    slots = allocator.alloc(8)
    assert slots is not None
    waits: list[str] = []

    def wait() -> None:
        waits.append("waited")
        if bench.CUDA:
            torch.cuda.synchronize()

    keep = torch.zeros(LAYERS, 8, dtype=torch.bool, device=DEVICE)
    keep[:, :2] = True
    eviction = arena.residency.evict(slots, keep)
    allocator.accounting.retire(eviction, SimpleNamespace(synchronize=wait, query=lambda: False))
    assert waits == []
    assert arena.residency.free_cells == 2 * LAYERS
    assert allocator.alloc(1) is not None
    assert waits == [], "there are enough"
    assert allocator.accounting.has_room(2)
    assert waits == ["waited"]
    assert arena.residency.free_cells == 7 * LAYERS
    assert allocator.verify_byte_accounting() == []
    assert waits == ["waited"], "once"
    assert passed_event(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("given", "installed", "dim", "dtype", "chosen"),
    [
        (None, True, 128, "auto", "flashinfer"),
        (None, True, 80, "auto", "triton"),
        (None, True, 128, "float32", "triton"),
        (None, False, 128, "auto", "triton"),
        ("triton", True, 128, "auto", "triton"),
    ],
)
def test_default_on_a_cuda_machine(
    given: str | None, installed: bool, dim: int, dtype: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlcache_sgl.sglang_hooks import compat

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: object() if installed else None)
    arguments = SimpleNamespace(
        attention_backend=given,
        device=None,
        dtype=dtype,
        disable_prefill_cuda_graph=False,
        radix_eviction_policy="lru",
    )
    compat.choose_defaults(arguments, {"text_config": {"hidden_size": 4 * dim, "num_attention_heads": 4}})
    assert arguments.attention_backend == chosen
    assert arguments.disable_prefill_cuda_graph
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    untouched = SimpleNamespace(attention_backend=None, device=None, radix_eviction_policy="lru")
    compat.choose_defaults(untouched, {})
    assert untouched.attention_backend is None
    assert untouched.radix_eviction_policy == "slru"
    asked = SimpleNamespace(radix_eviction_policy="lru", _radix_eviction_policy_explicitly_set=True, device=None)
    compat.choose_defaults(asked, {})
    assert asked.radix_eviction_policy == "lru"
    problems = list(compat.unsupported_arguments(SimpleNamespace(attention_backend="triton")))
    assert len(problems) == 1
    assert "torch_native" in problems[0]


def test_code_that_indexes_by_slot_is_refused() -> None:
    """SGLang's lists of buffers would hand out cells, whose numbers are not slots."""
    pool = make_pool(1)
    for read in (
        lambda: pool.get_key_buffer(0),
        lambda: pool.get_value_buffer(0),
        lambda: pool.get_kv_buffer(0),
        lambda: list(pool.k_buffer),
        lambda: pool.v_buffer[1],
    ):
        with pytest.raises(RuntimeError, match="slots do not number"):
            read()


@pytest.mark.parametrize("flag", ["enable_deterministic_inference", "enable_memory_saver"])
def test_flags_that_would_be_broken_silently_are_refused(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlcache_sgl.sglang_hooks.compat import unsupported_arguments

    (problem,) = unsupported_arguments(SimpleNamespace(**{flag: True}))
    assert problem.startswith(f"--kv-policy cannot be combined with --{flag.replace('_', '-')}: ")
    monkeypatch.setenv("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1")
    (problem,) = unsupported_arguments(SimpleNamespace())
    assert "SGLANG_ENABLE_METADATA_GLUE_GRAPH" in problem


def test_windows_are_served_by_triton_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlcache_sgl.config import ConfigError
    from vlcache_sgl.sglang_hooks import compat

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    asked = SimpleNamespace(attention_backend="flashinfer", device=None, radix_eviction_policy="lru")
    with pytest.raises(ConfigError, match="with triton, not flashinfer"):
        compat.choose_defaults(asked, {"text_config": {"model_type": "gemma3_text"}})


def test_a_small_batch_is_cut_into_enough_parts() -> None:
    """One request of Qwen2.5-VL-7B's shape on an H100: two programs per multiprocessor, not 32 in all."""
    from vlcache_sgl.attention.parts import PROGRAMS_PER_CORE, Parts

    cut = Parts(heads=28, kv_heads=4, dim=128, kv_splits=8, device=torch.device("cpu"))
    cut._cores, cut._tiles = 132, 4
    for batch in (1, 2, 8, 64):
        parts = cut._most_parts(batch)
        assert parts == 8 or batch * 4 * parts >= min(PROGRAMS_PER_CORE * 132, batch * 4 * 64)
        outputs, sums = cut._partials(cut._new_room(batch), batch)
        assert outputs.shape == (batch, 28, parts, 128)
        assert sums.shape == (batch, 28, parts)
    assert cut._most_parts(1) == 64
    assert cut._most_parts(64) == 8
