"""When the CPU platform activates, what it sets, and that what it replaces exists.  Serving is tested in e2e/."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vlcache_sgl.platform import cpu, host

CLASS_NAME = "vlcache_sgl.platform.srt:CpuPlatform"
VARIABLES = ("SGLANG_USE_CPU_ENGINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TORCHDYNAMO_DISABLE")
GIB = 1 << 30


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No accelerator, no CPU kernels, none of our variables, whatever the machine is."""
    before = dict(os.environ)
    for name in cpu.ACCELERATORS:
        monkeypatch.setitem(cpu.ACCELERATORS, name, lambda: False)
    monkeypatch.setattr(cpu, "CPU_KERNEL_DISTRIBUTIONS", ())
    for name in VARIABLES:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def srt() -> ModuleType:
    """The module of the platform class, imported in the only order that works."""
    import sglang.srt.platforms

    assert sglang.srt.platforms.current_platform is not None
    from vlcache_sgl.platform import srt

    return srt


# --- activation


def test_activates_on_a_bare_machine(bare_machine: None) -> None:
    assert cpu.activate() == CLASS_NAME


def test_the_entry_point_is_activate() -> None:
    (entry,) = importlib.metadata.entry_points(group="sglang.srt.platforms", name="vlcache_cpu")
    assert entry.load() is cpu.activate


@pytest.mark.parametrize("name", cpu.ACCELERATORS)
def test_stays_out_of_the_way_of_any_accelerator(
    bare_machine: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(cpu.ACCELERATORS, name, lambda: True)
    assert cpu.activate() is None
    assert not [name for name in VARIABLES if name in os.environ]


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "value"),
    [
        ("cuda or rocm", torch.cuda, "device_count", lambda: 1),
        ("xpu", torch.xpu, "device_count", lambda: 1),
        ("mps", torch.backends.mps, "is_available", lambda: True),
        ("npu", torch, "npu", SimpleNamespace()),
        ("hpu", importlib.util, "find_spec", lambda name: name == "habana_frameworks" or None),
        ("musa", torch.version, "musa", "4.0"),
        ("another", torch.accelerator, "is_available", lambda: True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_probe_sees_its_accelerator(
    monkeypatch: pytest.MonkeyPatch, name: str, owner: Any, attribute: str, value: Any
) -> None:
    monkeypatch.setattr(owner, attribute, value, raising=False)
    assert cpu.ACCELERATORS[name]()


def test_probing_does_not_initialise_cuda() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("another test has initialised CUDA")
    assert isinstance(cpu.ACCELERATORS["cuda or rocm"](), bool)
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(("value", "expected"), [("1", None), ("0", CLASS_NAME)])
def test_leaves_the_cpu_engine_to_sglang(
    bare_machine: None, monkeypatch: pytest.MonkeyPatch, value: str, expected: str | None
) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", value)
    assert cpu.activate() == expected


def test_leaves_installed_cpu_kernels_to_sglang(
    bare_machine: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "CPU_KERNEL_DISTRIBUTIONS", ("pytest",))
    assert cpu.activate() is None
    assert "SGLANG_USE_CPU_ENGINE=1" in caplog.text


def test_sets_defaults_of_the_environment_only(bare_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    cpu.activate()
    assert os.environ["TORCHDYNAMO_DISABLE"] == "0"
    assert os.environ["OMP_NUM_THREADS"] == str(host.usable_cores())
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


# --- the platform


def test_the_class_is_a_platform_of_sglang(srt: ModuleType) -> None:
    from sglang.srt.platforms.interface import SRTPlatform

    cls = pkgutil.resolve_name(CLASS_NAME)
    assert issubclass(cls, SRTPlatform)
    platform = cls()
    assert platform.is_out_of_tree()
    assert not platform.is_cpu()
    assert platform.get_device() == "cpu"
    assert platform.get_torch_distributed_backend_str() == "gloo"
    assert not platform.capabilities.supports_triton


def test_every_replaced_function_exists_and_is_called_alike(srt: ModuleType) -> None:
    for target, replacement in srt.REPLACED.items():
        original = inspect.unwrap(pkgutil.resolve_name(target))
        assert list(inspect.signature(original).parameters) == list(inspect.signature(replacement).parameters), target


def test_frames_stay_where_they_are(srt: ModuleType) -> None:
    owner, _, name = srt.PINNING.rpartition(".")
    assert getattr(pkgutil.resolve_name(owner), name).__name__ in ("pin_memory", srt.leave_unpinned.__name__)
    frames = torch.zeros(2, 3)
    assert srt.leave_unpinned(frames) is frames


def test_sglang_knows_the_variable_of_ranks(srt: ModuleType) -> None:
    from sglang.srt.utils import numa_utils

    assert f'"{srt.BIND_VARIABLE}"' in inspect.getsource(numa_utils.init_threads_binding)


@pytest.mark.parametrize(
    ("variable", "arch", "replaces"),
    [(None, "X86", False), ("0|1", "X86", True), (None, "ARM", True)],
    ids=["one rank", "ranks", "one rank on ARM"],
)
def test_replaces_nothing_of_sglang_for_one_rank_on_x86(
    srt: ModuleType, monkeypatch: pytest.MonkeyPatch, variable: str | None, arch: str, replaces: bool
) -> None:
    registered: list[str] = []
    monkeypatch.setattr(srt.HookRegistry, "register", lambda target, *_: registered.append(target))
    monkeypatch.setattr(srt.CpuPlatform, "cpu_arch", srt.CpuArchEnum[arch])
    monkeypatch.delenv(srt.BIND_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(srt.BIND_VARIABLE, variable)
    srt.CpuPlatform()
    assert registered == [srt.PINNING, *(srt.REPLACED if replaces else ())]


# --- defaults of flags

GIVEN = {
    "attention_backend": "flex_attention",
    "max_running_requests": 7,
    "chunked_prefill_size": 128,
    "mem_fraction_static": 0.5,
    "max_total_tokens": 999,
    "dtype": "float16",
}
NOT_GIVEN = {**dict.fromkeys(GIVEN), "dtype": "auto"}


def resolve(srt: ModuleType, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> SimpleNamespace:
    """What `apply_server_args_defaults` makes of these flags for a small model, 1024 bytes of KV per token."""
    model = SimpleNamespace(
        num_attention_layers=4, head_dim=32, v_head_dim=32, dtype=torch.float16, get_total_num_kv_heads=lambda: 2
    )
    monkeypatch.setattr(srt, "_model_config", lambda _: model)
    monkeypatch.setattr(srt, "_free_memory", lambda: GIB)
    # Set and deleted, so that what is set now is deleted at the end of the test.
    monkeypatch.setenv(srt.CONVOLUTION_VARIABLE, "")
    monkeypatch.delenv(srt.CONVOLUTION_VARIABLE)
    ranks = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "nnodes": 1, "kv_cache_dtype": "auto"}
    server_args = SimpleNamespace(**(NOT_GIVEN | ranks | flags))
    srt.CpuPlatform().apply_server_args_defaults(server_args)
    return server_args


def test_flags_that_were_not_given(srt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    args = resolve(srt, monkeypatch, attention_backend="intel_amx")
    assert args.attention_backend == "torch_native"
    assert args.dtype == "bfloat16"
    assert args.max_total_tokens == GIB // 8 // 1024
    assert args.sleep_on_idle
    for name in NOT_GIVEN:
        assert getattr(args, name) is not None


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_twice_as_many_tokens_of_one_byte(
    srt: ModuleType, monkeypatch: pytest.MonkeyPatch, kv_cache_dtype: str
) -> None:
    assert resolve(srt, monkeypatch, kv_cache_dtype=kv_cache_dtype).max_total_tokens == GIB // 8 // 512


def test_flags_that_were_given_stay(srt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    args = resolve(srt, monkeypatch, **GIVEN)
    assert {name: getattr(args, name) for name in GIVEN} == GIVEN


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", "bfloat16"), ("float16", "float16"), ("bfloat16", "bfloat16")]
)
def test_states_of_convolutions_have_the_type_of_the_model(
    srt: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: str, expected: str
) -> None:
    """The model here is float16, which `auto` makes bfloat16 on a CPU."""
    resolve(srt, monkeypatch, dtype=dtype)
    assert os.environ[srt.CONVOLUTION_VARIABLE] == expected


def test_a_given_memory_fraction_alone_decides(srt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(srt, monkeypatch, mem_fraction_static=0.5).max_total_tokens is None


def test_the_defaulted_flags_exist(srt: ModuleType) -> None:
    from sglang.srt.server_args import ServerArgs

    read = {*NOT_GIVEN, "sleep_on_idle", "tp_size", "pp_size", "dp_size", "nnodes", "kv_cache_dtype"}
    assert read <= set(inspect.signature(ServerArgs).parameters)


@pytest.mark.parametrize(
    ("free_bytes", "token_bytes", "tokens"),
    [
        (16 * GIB, 1 << 20, 2048),  # an eighth of the memory
        (1024 * GIB, 1 << 20, 4096),  # 4 GiB
        (1024 * GIB, 1 << 10, 1 << 18),  # a quarter of a million tokens
    ],
    ids=["share", "bytes", "tokens"],
)
def test_kv_tokens(srt: ModuleType, free_bytes: int, token_bytes: int, tokens: int) -> None:
    assert srt.kv_tokens(free_bytes, token_bytes) == tokens


def test_ranks_of_this_machine_get_cores_of_their_own(srt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "physical_cores", lambda: [0, 2, 4, 6])
    monkeypatch.setenv(srt.BIND_VARIABLE, "")
    monkeypatch.delenv(srt.BIND_VARIABLE)
    resolve(srt, monkeypatch)
    assert srt.BIND_VARIABLE not in os.environ
    resolve(srt, monkeypatch, tp_size=4, nnodes=2)
    assert os.environ[srt.BIND_VARIABLE] == "0,2|4,6"
    resolve(srt, monkeypatch, tp_size=4)
    assert os.environ[srt.BIND_VARIABLE] == "0,2|4,6", "a given value stays"


def test_only_ranks_with_cores_of_their_own_are_bound(srt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[list[int]] = []
    monkeypatch.setattr(host, "bind_threads", bound.append)
    monkeypatch.delenv(srt.BIND_VARIABLE, raising=False)
    srt.bind_rank(local_omp_cpuid="0,1")
    monkeypatch.setenv(srt.BIND_VARIABLE, "0-2|3")
    srt.bind_rank(local_omp_cpuid="0-2", dist_init_method="tcp://127.0.0.1:1")
    assert bound == [[0, 1, 2]]


# --- the machine


@pytest.mark.parametrize(("text", "cpus"), [("0", [0]), ("0-2,8\n", [0, 1, 2, 8]), ("3,1", [3, 1]), ("", [])], ids=repr)
def test_parse_cpu_list(text: str, cpus: list[int]) -> None:
    assert host.parse_cpu_list(text) == cpus


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"),
    [(4, 1, "0,1,2,3"), (4, 2, "0,1|2,3"), (5, 2, "0,1|2,3,4"), (2, 3, "0|0|1"), (1, 2, "0|0")],
)
def test_split_cores(monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, expected: str) -> None:
    monkeypatch.setattr(host, "physical_cores", lambda: list(range(cores)))
    assert host.split_cores(ranks) == expected


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("250000 100000", 3), ("10000 100000", 1), (None, 8)], ids=str
)
def test_usable_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str | None, cores: int) -> None:
    monkeypatch.setattr(host, "physical_cores", lambda: list(range(8)))
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert host.usable_cores() == cores


def test_physical_cores_counts_siblings_once_and_keeps_nodes_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in range(8):  # cores 0 to 3 with siblings 4 to 7; even ones on node 0
        topology = tmp_path / f"cpu{number}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    for node in range(2):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}/cpulist").write_text(",".join(str(n) for n in range(node, 8, 2)))
    monkeypatch.setattr(host, "_CPUS", tmp_path)
    monkeypatch.setattr(host, "_NODES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 4, 5, 7})
    assert host.physical_cores() == [0, 2, 1, 7]


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"], ids=["v2", "v1"])
def test_total_memory_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    whole = host.total_memory()
    assert whole > GIB // 4
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f"{1 << 20}\n")
    assert host.total_memory() == 1 << 20
    (tmp_path / name).write_text("9223372036854771712\n")
    assert host.total_memory() == whole


def test_bind_threads() -> None:
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        host.bind_threads([min(before)])
        assert os.sched_getaffinity(0) == {min(before)}
        assert torch.get_num_threads() == 1
    finally:
        host.bind_threads(sorted(before))
        torch.set_num_threads(threads)
