"""The text that names a policy."""

import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from vlcache_sgl.api import Selection
from vlcache_sgl.policy.errors import PolicyError
from vlcache_sgl.policy.spec import Owner, Spec, assign, parse


@dataclass(frozen=True)
class Scorer:
    window: int = 32
    pool: Literal["avg", "max"] = "avg"
    gamma: float = 1.0
    limit: float | None = None
    values: bool = True


@dataclass(frozen=True)
class Allocator:
    window: int = 8
    file: str = field(default="", metadata={"operator_only": True})


OWNERS = (
    Owner("scorer", "scorer s", Scorer),
    Owner("allocator", "allocator a", Allocator),
    Owner("selection", "selection", Selection),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("snapkv", Spec("snapkv", None, None, (), {})),
        (" snapkv ", Spec("snapkv", None, None, (), {})),
        ("vlcache:paper", Spec("vlcache", None, None, ("paper",), {})),
        ("snapkv:max,window=64", Spec("snapkv", None, None, ("max",), {"window": "64"})),
        ("x:file=a:b=c", Spec("x", None, None, (), {"file": "a:b=c"})),
        ("scorer=a,allocator=b", Spec(None, "a", "b", (), {})),
        ("allocator=b, scorer=a, sink=4", Spec(None, "a", "b", (), {"sink": "4"})),
    ],
)
def test_parse(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", ":", ":window=3", "a:", "a:,", "a:x=", "a:=3", "scorer=a", "allocator=b", "scorer=a,allocator=b,max", "a=b"],
)
def test_neither_form(text):
    with pytest.raises(PolicyError, match="expected NAME, NAME:variant-or-key=value"):
        parse(text)


def test_a_key_given_twice():
    with pytest.raises(PolicyError, match="sets 'window' twice"):
        parse("snapkv:window=1,window=2")


@pytest.mark.parametrize(
    ("key", "text", "role", "value"),
    [
        ("scorer.window", "64", "scorer", 64),
        ("allocator.window", "64", "allocator", 64),
        ("pool", "max", "scorer", "max"),
        ("gamma", "1e-3", "scorer", 0.001),
        ("limit", "none", "scorer", None),
        ("limit", "0.5", "scorer", 0.5),
        ("values", "off", "scorer", False),
        ("values", "True", "scorer", True),
        ("sink", "4", "selection", 4),
        ("recent", "0.1", "selection", 0.1),
        ("heads", "split", "selection", "split"),
        ("file", "weights.json", "allocator", "weights.json"),
    ],
)
def test_values_get_the_type_of_their_field(key, text, role, value):
    assert assign({key: text}, OWNERS)[role] == {key.rpartition(".")[2]: value}


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        (
            "windw",
            "3",
            "unknown parameter 'windw' (did you mean 'window'?); choose from: "
            "scorer s: window, pool, gamma, limit, values; ",
        ),
        ("window", "3", "window belongs to scorer s and allocator a: write scorer.window= or allocator.window="),
        ("selection.window", "3", "unknown parameter"),
        ("scorer.window", "3.5", "scorer.window of scorer s must be a whole number, got '3.5'"),
        ("gamma", "big", "must be a number, got 'big'"),
        ("pool", "min", "must be one of avg, max, got 'min'"),
        ("values", "maybe", "must be true or false"),
    ],
)
def test_wrong_settings_are_told_with_the_choices(key, text, message):
    with pytest.raises(PolicyError, match=re.escape(message)):
        assign({key: text}, OWNERS)


def test_typed_values_of_a_recipe_pass():
    assert assign({"gamma": 2.0}, OWNERS)["scorer"] == {"gamma": 2.0}


def test_a_request_cannot_name_files():
    with pytest.raises(PolicyError, match="only be set by --kv-policy"):
        assign({"file": "/etc/passwd"}, OWNERS, from_request=True)
