"""Patches: all or nothing, verified, undone; and every target of ours exists in the installed SGLang."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from transformers import PretrainedConfig

from vlcache_sgl.config import config_from
from vlcache_sgl.sglang_hooks.gate import Gate
from vlcache_sgl.sglang_hooks.patch_points import runtime_points
from vlcache_sgl.sglang_hooks.patching import PatchError, Patches, PatchPoint, locate
from vlcache_sgl.sglang_hooks.request_points import HTTP_POINTS, MEDIA_POINTS, gate_http_points, gate_points
from vlcache_sgl.sglang_hooks.session import Session
from vlcache_sgl.sglang_hooks.startup import START_POINTS


@pytest.fixture
def victim() -> Iterator[types.ModuleType]:
    module = types.ModuleType("patching_victim")
    exec(
        "class Thing:\n"
        "    def method(self, x): return x + 1\n"
        "    @staticmethod\n"
        "    def static(x): return x * 2\n"
        "    @classmethod\n"
        "    def make(cls, x): return (cls.__name__, x)\n"
        "    @property\n"
        "    def size(self): return 7\n"
        "def function(x): return -x\n"
        "TABLE = {'a': 1}\n",
        module.__dict__,
    )
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def point(path: str, how: str, hook: object) -> PatchPoint:
    return PatchPoint(f"patching_victim:{path}", how, hook, "a test")  # type: ignore[arg-type]


def test_every_kind_of_patch_and_back(victim: types.ModuleType) -> None:
    calls: list[object] = []
    patches = Patches(
        [
            point("Thing.method", "around", lambda original, self, x: original(self, x) * 100),
            point("Thing.static", "before", lambda x: calls.append(x)),
            point("Thing.make", "after", lambda result, cls, x: (*result, "patched")),
            point("Thing.size", "replace", lambda old: property(lambda self: old.fget(self) + 1)),
            point("function", "after", lambda result, x: None),
            point("TABLE[a]", "replace", lambda old: old + 1),
        ]
    )
    before = {name: dict(vars(victim.Thing))[name] for name in ("method", "static", "make", "size")}
    patches.install()
    patches.verify()
    thing = victim.Thing()
    assert thing.method(1) == 200
    assert victim.Thing.static(4) == 8
    assert calls == [4]
    assert victim.Thing.make(3) == ("Thing", 3, "patched")
    assert thing.size == 8
    assert victim.function(5) == -5  # None keeps the result
    assert victim.TABLE == {"a": 2}
    patches.uninstall()
    # Looked up where they were put: the class's own dictionary holds the very objects of before.
    assert {name: vars(victim.Thing)[name] for name in before} == before
    assert victim.TABLE == {"a": 1}


def test_a_missing_target_installs_nothing_and_is_named(victim: types.ModuleType) -> None:
    patches = Patches(
        [
            point("function", "after", lambda result, x: 0),
            point("Thing.gone", "after", lambda result: 0),
            point("TABLE[b]", "replace", lambda old: old),
        ]
    )
    with pytest.raises(PatchError) as caught:
        patches.install()
    assert "Thing.gone" in str(caught.value)
    assert "TABLE[b]" in str(caught.value)
    assert victim.function(5) == -5


def test_verify_notices_somebody_elses_patch(victim: types.ModuleType) -> None:
    patches = Patches([point("function", "after", lambda result, x: 0)])
    with pytest.raises(PatchError):
        patches.verify()  # never installed
    patches.install()
    victim.function = abs
    with pytest.raises(PatchError, match="function"):
        patches.verify()


def test_every_target_exists_in_sglang() -> None:
    config = config_from({"kv_policy": "vlcache"})
    assert config is not None
    model = SimpleNamespace(
        num_attention_layers=2,
        num_attention_heads=4,
        get_total_num_kv_heads=lambda: 2,
        head_dim=16,
        hf_config=PretrainedConfig(),
        hf_text_config=PretrainedConfig(),
        linear_attn_registry_result=None,
    )
    gate = Gate(config, model, ranks=1)
    points = [
        *START_POINTS,
        *MEDIA_POINTS,
        *HTTP_POINTS,
        *gate_points(gate),
        *gate_http_points(gate),
        *runtime_points(Session(config)),
    ]
    for one in points:
        locate(one.target)
    assert len({one.target for one in points}) == len(points)
    assert all(one.why for one in points)


def test_session_leaves_sglang_as_it_was() -> None:
    config = config_from({"kv_policy": "vlcache"})
    assert config is not None
    points = runtime_points(Session(config))
    places = [locate(one.target) for one in points]
    patches = Patches(points)
    patches.install()
    assert all(place.get() is not place.raw for place in places)
    patches.uninstall()
    assert all(place.get() is place.raw for place in places)
