"""Every attribute that we read of SGLang's objects exists in the installed SGLang."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from typing import Any

import pytest
import typing_extensions

from vlcache_sgl.sglang_hooks import facades
from vlcache_sgl.sglang_hooks.facades import CLASSES


def read_of(protocol: type) -> set[str]:
    """Names that a protocol lists."""
    return set(typing_extensions.get_protocol_members(protocol))


def known_of(cls: type) -> set[str]:
    """Names that objects of a class have: fields, annotations, class attributes, and what its methods assign."""
    names: set[str] = set(dir(cls))
    for base in cls.__mro__:
        names |= set(inspect.get_annotations(base)) | set(vars(base))
        if base.__module__.split(".")[0] == "sglang":
            names |= assigned(base)
    return names


def assigned(cls: type) -> set[str]:
    """Attributes of `self` that the source of a class assigns."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def given(function: Any) -> set[str]:
    """Attributes of the namespaces that a function makes."""
    calls = (node for node in ast.walk(ast.parse(inspect.getsource(function))) if isinstance(node, ast.Call))
    made = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "SimpleNamespace")
    return {keyword.arg for call in made for keyword in call.keywords if keyword.arg is not None}


def class_of(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("protocol", CLASSES, ids=lambda protocol: protocol.__name__)
def test_attributes_exist_in_sglang(protocol: type) -> None:
    read = read_of(protocol)
    assert read, "a facade of nothing"
    theirs = class_of(CLASSES[protocol])
    assert read - (known_of(theirs) if inspect.isclass(theirs) else given(theirs)) == set()


def test_every_protocol_has_its_class() -> None:
    own = [value for value in vars(facades).values() if inspect.isclass(value)]
    assert {value for value in own if value.__module__ == facades.__name__} == set(CLASSES)


def test_an_attribute_that_is_gone_is_found() -> None:
    class Before:
        def __init__(self) -> None:
            self.there = 1

    assert "there" in assigned(Before)
    assert "gone" not in known_of(Before) | assigned(Before)
