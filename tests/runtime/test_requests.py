"""What a request may choose: anything malformed or out of bounds is one bounded message, never another error."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vlcache_sgl.config import ConfigError, config_from
from vlcache_sgl.policy import PolicyError
from vlcache_sgl.runtime.requests import LONGEST_SPEC, Choices, wanted_report

LONGEST_MESSAGE = 4000


def choices(**flags: str) -> Choices:
    config = config_from({"kv_policy": "vlcache", **flags})
    assert config is not None
    return Choices(config)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, 2**63, -(10**4000), True, 5e-324]))
texts = st.one_of(st.text(max_size=30), st.sampled_from(["a" * 10**6, "\ud800", "\0", "nan", "1e999", "\uff11"]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
NAMES = st.sampled_from(["vlcache", "snapkv", "h2o", "chunkkv", "table", "uniform", "pyramidkv", "scorer", "nobody"])
KEYS = st.sampled_from(
    ["window", "sink", "protect", "file", "seed", "kernel", "heads", "scorer.window", "p", "", "\ud800"]
)
VALUES = st.one_of(st.integers().map(str), st.floats().map(str), texts, st.sampled_from(["none", "true", "9" * 5000]))
SETTINGS = st.lists(st.tuples(KEYS, VALUES).map("=".join), min_size=1, max_size=3).map(",".join)
specs = st.one_of(
    NAMES,
    st.tuples(NAMES, SETTINGS).map(":".join),
    st.tuples(NAMES, NAMES, SETTINGS).map(lambda parts: f"scorer={parts[0]},allocator={parts[1]},{parts[2]}"),
    texts,
)
keys = {"kv_policy": st.one_of(specs, anything), "kv_budget": st.one_of(numbers, anything), "kv_report": anything}
DEFAULT = choices()


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(params=st.one_of(st.fixed_dictionaries({}, optional=keys), anything))
@example(params={"kv_budget": 10**400})
@example(params={"kv_budget": -(10**400)})
@example(params={"kv_policy": " " * 10**6 + "vlcache"})
@example(params={"kv_policy": "vlcache:\ud800=1,\ud800=1"})
def test_malformed_parameters_are_one_message(params: Any) -> None:
    check(params)


@pytest.mark.parametrize("key", ["kv_policy", "kv_budget", "kv_report", None])
def test_deeply_nested_parameters(key: str | None) -> None:
    check(nested(900) if key is None else {key: nested(900)})


def check(params: Any) -> None:
    try:
        choice = DEFAULT.select(params, 1000)
        wanted_report(params)
    except (ConfigError, PolicyError) as error:
        message = str(error)
        assert 0 < len(message) < LONGEST_MESSAGE
        message.encode()  # what goes into a response
    else:
        assert choice.fingerprint.encode()


def test_texts_that_are_remembered_are_short() -> None:
    """A padded name means the same policy and would be remembered whole."""
    with pytest.raises(ConfigError, match=f"at most {LONGEST_SPEC} characters"):
        DEFAULT.select({"kv_policy": "vlcache" + " " * LONGEST_SPEC}, 1000)
    assert all(len(spec) <= LONGEST_SPEC for spec, *_ in DEFAULT._known)


@pytest.mark.parametrize("budget", [0.04, 0.61, 3, 700])
def test_budgets_stay_within_the_servers_bounds(budget: float) -> None:
    bounded = choices(kv_budget_min="0.05", kv_budget_max="0.6")
    with pytest.raises(ConfigError, match="bounds"):
        bounded.select({"kv_budget": budget}, 1000)
    assert bounded.select({"kv_budget": 0.5}, 1000).budget.fraction == 0.5


@pytest.mark.parametrize(
    "spec", ["h2o", "scorer=snapkv,allocator=vlcache", "scorer=h2o,allocator=uniform", "snapkv,h2o", "snapkv "]
)
def test_only_allowed_policies(spec: str) -> None:
    with pytest.raises(ConfigError, match="not allowed"):
        choices(kv_allow_policies="snapkv").select({"kv_policy": spec}, 1000)


@pytest.mark.parametrize("key", ["file", "allocator.file"])
def test_a_request_names_no_file(key: str, tmp_path: Any) -> None:
    """Not even an existing one: the refusal comes before it is looked for."""
    table = tmp_path / "table.json"
    table.write_text("[1]")
    with pytest.raises(PolicyError, match="only be set by --kv-policy"):
        DEFAULT.select({"kv_policy": f"scorer=vlcache,allocator=table,{key}={table}"}, 1000)
