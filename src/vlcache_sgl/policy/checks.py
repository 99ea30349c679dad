"""What a scorer or allocator class must look like; each function returns a complaint or None."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Any, Literal, Union

from vlcache_sgl.api.needs import Needs
from vlcache_sgl.api.protocols import Allocator, BudgetSum, Scorer

PLAIN = (int, float, bool, str)


def scorer_problem(what: str, factory: object) -> str | None:
    """What is wrong with the class of a scorer, which messages call `what`."""
    return _factory_problem(factory, what, "score", ("layer", "prompt"), ("query_aware",))


def allocator_problem(what: str, factory: object) -> str | None:
    """What is wrong with the class of an allocator, which messages call `what`."""
    return _factory_problem(factory, what, "allocate", ("layers", "prompt", "budget"), ())


def _factory_problem(
    factory: object, what: str, method: str, arguments: tuple[str, ...], attributes: tuple[str, ...]
) -> str | None:
    """Whether `factory` is a frozen dataclass with plain fields, `attributes`, and `method` taking `arguments`."""
    if not inspect.isclass(factory) or not dataclasses.is_dataclass(factory):
        return f"{what}: the factory {factory!r} must be a dataclass"
    if not factory.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return f"{what}: {factory.__name__} must be a frozen dataclass"
    for attribute in attributes:
        if not hasattr(factory, attribute):
            return f"{what}: {factory.__name__} has no `{attribute}`"
    function = getattr(factory, method, None)
    if function in (Scorer.score, Allocator.allocate):
        function = None  # inherited from the protocol, where it does nothing
    expected = f"{method}(self, {', '.join(arguments)})"
    if not callable(function):
        return f"{what}: {factory.__name__} has no method {expected}"
    try:
        inspect.signature(function).bind(None, *arguments)
    except TypeError:
        return f"{what}: wrong signature {method}{inspect.signature(function)}, expected {expected}"
    try:
        hints = parameter_types(factory)
    except (NameError, TypeError) as error:
        return f"{what}: the field types of {factory.__name__} cannot be read: {error}"
    for name, hint in hints.items():
        if not _is_plain(hint):
            return f"{what}: field {name!r} has type {hint!r}; a user can only set int, float, bool, str and Literal"
    return None


def parameter_types(factory: type[Any]) -> dict[str, Any]:
    """Field name -> type of what a user may set."""
    hints = typing.get_type_hints(factory)
    return {f.name: hints[f.name] for f in dataclasses.fields(factory) if f.init}


def is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType) and type(None) in typing.get_args(hint)


def strip_optional(hint: Any) -> Any:
    """``float | None`` -> ``float``."""
    if not is_optional(hint):
        return hint
    rest = [part for part in typing.get_args(hint) if part is not type(None)]
    return rest[0] if len(rest) == 1 else hint


def _is_plain(hint: Any) -> bool:
    hint = strip_optional(hint)
    return hint in PLAIN or typing.get_origin(hint) is Literal


def needs_of(part: object) -> Needs:
    """What a scorer or allocator declares; nothing where it declares nothing."""
    if inspect.getattr_static(part, "needs", None) is None:
        return Needs()
    needs: Needs = part.needs  # type: ignore[attr-defined]  # an AttributeError of a property is its author's to see
    return needs


def needs_problem(part: object) -> str | None:
    """Why the runtime could not serve what a scorer or allocator declares, or None."""
    needs = needs_of(part)
    if not isinstance(needs, Needs):
        return f"`needs` is {needs!r}, expected a Needs"
    if (rule := getattr(part, "budget_sum", "exact")) not in typing.get_args(BudgetSum):
        return f"`budget_sum` is {rule!r}, expected one of {', '.join(typing.get_args(BudgetSum))}"
    if (needs.reads_attention or needs.queries) and needs.rows.kind == "none":
        return "needs attention or queries, but names no rows"
    if needs.probabilities and needs.rows.kind == "all":
        return "needs the whole probability matrix of all rows, which no server can hold; use column statistics"
    if needs.rows.kind == "all" and not getattr(part, "prefix_hit", ""):
        return "asks for all rows, but has no `prefix_hit` that says what happens to rows from the prefix cache"
    return None


def pair_problem(scorer: object, allocator: object) -> str | None:
    """Why these two cannot work together, or None."""
    if getattr(allocator, "compares_layers", False) and not getattr(scorer, "comparable", False):
        return "the allocator ranks scores across layers, but this scorer's are only comparable within a layer"
    first, second = (needs_of(part) for part in (scorer, allocator))
    if first.rows == second.rows and None not in (first.density, second.density) and first.density != second.density:
        return f"they ask for different density thresholds over the same rows: {first.density} and {second.density}"
    return None
