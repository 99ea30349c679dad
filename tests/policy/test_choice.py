"""What a request may choose: anything malformed or out of bounds is one bounded message, never another error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vlcache_sgl.config import ConfigError, KVBudget, config_from
from vlcache_sgl.policy import PolicyError, custom_params
from vlcache_sgl.policy.choice import Choice, Choices
from vlcache_sgl.policy.custom_params import MAX_SPEC_LENGTH, RequestParams, misplaced

MAX_MESSAGE_LENGTH = 4000


def choices(**flags: str) -> Choices:
    config = config_from({"kv_policy": "vlcache", **flags})
    assert config is not None
    return Choices(config)


def select(among: Choices, custom_params: Any) -> Choice:
    return among.select(RequestParams.read(custom_params), 1000)


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
        choice = select(DEFAULT, params)
    except (ConfigError, PolicyError) as error:
        message = str(error)
        assert 0 < len(message) < MAX_MESSAGE_LENGTH
        message.encode()  # what goes into a response
    else:
        assert choice.fingerprint.encode()


def test_texts_that_are_remembered_are_short() -> None:
    """A padded name means the same policy and would be remembered whole."""
    with pytest.raises(ConfigError, match=f"at most {MAX_SPEC_LENGTH} characters"):
        select(DEFAULT, {"kv_policy": "vlcache" + " " * MAX_SPEC_LENGTH})
    assert all(len(spec) <= MAX_SPEC_LENGTH for spec, *_ in DEFAULT._known)


@pytest.mark.parametrize("budget", [0.04, 0.61, 3, 700])
def test_budgets_stay_within_the_servers_bounds(budget: float) -> None:
    bounded = choices(kv_budget_min="0.05", kv_budget_max="0.6")
    with pytest.raises(ConfigError, match="bounds"):
        select(bounded, {"kv_budget": budget})
    assert select(bounded, {"kv_budget": 0.5}).budget.fraction == 0.5


@pytest.mark.parametrize(
    "spec", ["h2o", "scorer=snapkv,allocator=vlcache", "scorer=h2o,allocator=uniform", "snapkv,h2o", "snapkv "]
)
def test_only_allowed_policies(spec: str) -> None:
    with pytest.raises(ConfigError, match="not allowed"):
        select(choices(kv_allow_policies="snapkv"), {"kv_policy": spec})


@pytest.mark.parametrize("key", ["file", "allocator.file"])
def test_a_request_names_no_file(key: str, tmp_path: Any) -> None:
    """Not even an existing one: the refusal comes before it is looked for."""
    table = tmp_path / "table.json"
    table.write_text("[1]")
    with pytest.raises(PolicyError, match="only be set by --kv-policy"):
        select(DEFAULT, {"kv_policy": f"scorer=vlcache,allocator=table,{key}={table}"})


@pytest.mark.parametrize(
    ("name", "meant"), [("kv_budgt", "kv_budget"), ("kv_polcy", "kv_policy"), ("kv_", None), ("kv_guard", None)]
)
def test_a_misspelled_name_is_refused(name: str, meant: str | None) -> None:
    with pytest.raises(ConfigError) as refused:
        RequestParams.read({name: 0.2})
    message = str(refused.value)
    assert repr(name) in message
    assert all(key in message for key in custom_params.KEYS)
    assert ("did you mean" in message) == (meant is not None)
    assert meant is None or f"did you mean {meant}?" in message


def test_other_custom_params_are_not_ours() -> None:
    assert RequestParams.read({"thinking_budget": 3, "kv": 1}) == RequestParams()


def test_read_once_whole() -> None:
    asked = {"kv_policy": "snapkv", "kv_budget": 64, "kv_share": "off", "kv_report": "positions", "other": []}
    assert RequestParams.read(asked) == RequestParams("snapkv", KVBudget(tokens=64), "off", report="positions")


@pytest.mark.parametrize("budget", [0.25, 1.0, 2, 100, 4096])
def test_a_budget_is_accepted_as_it_is_printed(budget: float) -> None:
    parsed = KVBudget.parse(budget)
    assert KVBudget.parse(str(parsed)) == parsed
    assert RequestParams.read({"kv_budget": str(parsed)}).budget == parsed


CHAT = SimpleNamespace(custom_params=None)
GENERATE = SimpleNamespace(sampling_params={}, kv_hints=None)
OTHER = SimpleNamespace()


@pytest.mark.parametrize(
    ("body", "request_", "message"),
    [
        ({"kv_policy": "snapkv"}, CHAT, "'kv_policy' belongs into custom_params"),
        ({"kv_policy": "snapkv"}, GENERATE, "'kv_policy' belongs into sampling_params.custom_params"),
        ({"kv_polcy": "snapkv"}, CHAT, "did you mean kv_policy?"),
        ({"kv_budget": 1}, OTHER, "this endpoint does not read 'kv_budget'"),
        ({"custom_params": {"kv_budget": 1}}, OTHER, "this endpoint does not read custom_params"),
        ({"custom_params": {"kv_budgt": 1}}, GENERATE, "belongs into sampling_params"),
        ({"custom_params": {"kv_budget": 1}}, CHAT, None),
        ({"custom_params": {"thinking_budget": 1}}, OTHER, None),
        ({"kv_hints": {}, "model": "m"}, GENERATE, None),
        (["kv_policy"], CHAT, None),
    ],
)
def test_what_an_endpoint_would_ignore(body: Any, request_: Any, message: str | None) -> None:
    found = misplaced(body, request_)
    assert found is None if message is None else found is not None and message in found
