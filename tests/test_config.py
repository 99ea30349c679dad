"""Flags: what they mean, and one clear line for everything they cannot mean."""

from __future__ import annotations

import pytest

from vlcache_sgl.config import FLAGS, ConfigError, Flag, KVBudget, KVConfig, config_from


def test_no_policy_no_config() -> None:
    assert config_from({}) is None
    assert config_from({flag.dest: None for flag in FLAGS}) is None


def test_defaults_and_values() -> None:
    config = config_from({"kv_policy": "vlcache"})
    assert config == KVConfig("vlcache")
    config = config_from(
        {
            "kv_policy": " snapkv:window=64 ",
            "kv_budget": "64",
            "kv_scope": "all",
            "kv_min_tokens": "0",
            "kv_overcommit": "3.5",
            "kv_head_cells": True,
            "kv_budget_min": "0.05",
            "kv_budget_max": "0.5",
            "kv_allow_policies": "vlcache, snapkv",
        }
    )
    assert config == KVConfig(
        "snapkv:window=64", KVBudget(tokens=64), "all", 0, 3.5, True, 0.05, 0.5, ("vlcache", "snapkv")
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kv_budget": "0.1"}, ["--kv-budget", "--kv-policy"]),
        ({"kv_policy": "  "}, ["--kv-policy"]),
        *(({"kv_policy": "v", "kv_budget": b}, ["--kv-budget"]) for b in ("0", "-1", "1.5", "x", "nan", "inf", True)),
        ({"kv_policy": "v", "kv_scope": "some"}, ["--kv-scope", "vision, all"]),
        *(({"kv_policy": "v", "kv_min_tokens": t}, ["--kv-min-tokens"]) for t in ("-1", "1.5", "x")),
        *(({"kv_policy": "v", "kv_overcommit": f}, ["--kv-overcommit"]) for f in ("0.5", "65", "x", "nan")),
        *(({"kv_policy": "v", "kv_budget_min": s}, ["--kv-budget-min"]) for s in ("0", "1.1", "x")),
        ({"kv_policy": "v", "kv_budget_min": "0.5", "kv_budget_max": "0.2"}, ["--kv-budget-min", "--kv-budget-max"]),
        ({"kv_policy": "v", "kv_budget": 0}, ["--kv-budget"]),  # `sgl.Engine` passes numbers
        ({"kv_policy": "v", "kv_head_cells": "no"}, ["--kv-head-cells", "true or false"]),
        *(
            ({"kv_policy": "v", "kv_allow_policies": n}, ["--kv-allow-policies"])
            for n in (",", "*,knorm", "none,knorm")
        ),
        ({"kv_policy": "v", "kv_share": "tiered"}, ["--kv-share", "exact, policy, off"]),
    ],
)
def test_wrong_values_are_one_line_that_names_the_flag(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from(values)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"kv_budget": "0.1", "kv_budget_min": "0.5"},
            "--kv-budget-min 0.5 is above --kv-budget 0.1, what a prompt keeps by default",
        ),
        (
            {"kv_budget": "0.9", "kv_budget_max": "0.5"},
            "--kv-budget-max 0.5 is below --kv-budget 0.9, what a prompt keeps by default",
        ),
        ({"kv_share": "exact", "kv_host_memory": "off"}, "--kv-share exact needs host memory"),
    ],
)
def test_flags_that_contradict_another_or_do_nothing_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from({"kv_policy": "v", **values})
    assert str(caught.value) == message


def test_a_small_budget_is_no_contradiction_of_a_bound_that_was_not_given() -> None:
    config = config_from({"kv_policy": "v", "kv_budget": "0.001"})
    assert config is not None
    assert config.budget_min > 0.001


def test_zero_is_a_value_and_a_switch_that_is_off_is_none() -> None:
    """As `sgl.Engine` passes them."""
    config = config_from({"kv_policy": "v", "kv_min_tokens": 0, "kv_head_cells": False})
    assert config == KVConfig("v", min_tokens=0)
    assert config_from({"kv_head_cells": False}) is None


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_help_and_message_of_a_flag_name_the_same_bounds(flag: Flag) -> None:
    with pytest.raises(ConfigError) as caught:
        flag.read(object())
    assert str(caught.value).startswith(f"{flag.name} must be {flag.values.words}, got ")
    assert flag.switch or flag.values.words in flag.explained


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.default_words is None], ids=lambda flag: flag.name)
def test_the_default_that_help_names_is_the_default(flag: Flag) -> None:
    assert flag.read(flag.default) == getattr(KVConfig("v"), flag.field)


@pytest.mark.parametrize(
    ("budget", "owned", "length", "target"),
    [
        (KVBudget(fraction=0.1), 1000, 1000, 600),
        (KVBudget(fraction=0.1), 1000, 4000, 600),  # the prefix has had its share
        (KVBudget(fraction=1.0), 1000, 1000, 6000),
        (KVBudget(tokens=64), 1000, 1000, 384),
        (KVBudget(tokens=64), 500, 1000, 192),
        (KVBudget(tokens=5000), 1000, 1000, 6000),
        (KVBudget(fraction=0.0001), 1000, 1000, 6),  # a token per layer at least
    ],
)
def test_budget_target(budget: KVBudget, owned: int, length: int, target: int) -> None:
    assert budget.target(owned, length, num_layers=6) == target


def test_overcommit_auto_follows_the_budget() -> None:
    factors = [KVConfig("v", KVBudget(fraction=f)).overcommit_factor for f in (1.0, 0.5, 0.2, 0.1, 0.01)]
    assert factors == [1.0, 1.6, 4.0, 8.0, 16.0]


def test_without_host_memory_nothing_is_shared_unless_that_is_asked_for() -> None:
    plain = config_from({"kv_policy": "vlcache"})
    without = config_from({"kv_policy": "vlcache", "kv_host_memory": "off"})
    asked = config_from({"kv_policy": "vlcache", "kv_host_memory": "off", "kv_share": "policy"})
    assert [config.share for config in (plain, without, asked) if config] == ["exact", "off", "policy"]
