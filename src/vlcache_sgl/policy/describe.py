"""What can be told about a policy without running it: for `vlcache policies` and for the documentation."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from dataclasses import dataclass
from typing import Any, Literal

from vlcache_sgl.api.needs import Needs
from vlcache_sgl.api.records import AllocatorPlugin, RecipePlugin, ScorerPlugin, Selection
from vlcache_sgl.policy.checks import needs_of, parameter_types
from vlcache_sgl.policy.manager import Registered, Registry

Kind = Literal["policy", "scorer", "allocator"]


@dataclass(frozen=True)
class Parameter:
    """Something a user may set."""

    name: str
    type: str
    default: str
    text: str = ""


@dataclass(frozen=True)
class Description:
    """One registered name."""

    kind: Kind
    name: str
    summary: str
    paper: str
    provider: str
    """Distribution and version."""
    parameters: tuple[Parameter, ...]
    """Own parameters; of a policy those that differ from the defaults of its parts."""
    query_aware: bool | None = None
    """None for allocators."""
    needs: str = ""
    parts: str = ""
    """What a policy is made of: ``scorer x allocator``."""
    variants: tuple[str, ...] = ()
    text: str = ""
    """The whole docstring."""
    prefix_hit: str = ""
    """What is declared to happen after a prefix hit, where it matters."""


def describe(registry: Registry) -> list[Description]:
    """Everything installed: policies, then scorers, then allocators, by name."""
    recipes = [_recipe(registry, entry) for entry in registry.recipes.values()]
    scorers = [_part("scorer", entry) for entry in registry.scorers.values()]
    allocators = [_part("allocator", entry) for entry in registry.allocators.values()]
    return [*recipes, *scorers, *allocators]


def describe_needs(needs: Needs) -> str:
    """For instance ``last 32 rows: column_sum; keys``."""
    rows = {
        "none": "",
        "all": "all rows",
        "repeat": "rows of a second reading",
        "last": "last row" if needs.rows.count == 1 else f"last {needs.rows.count} rows",
        "post_vision": "post-vision rows" + (f" (at most {needs.rows.count})" if needs.rows.count else ""),
    }[needs.rows.kind]
    asked = [f.name for f in dataclasses.fields(needs) if f.name != "rows" and getattr(needs, f.name)]
    of_rows = [name for name in asked if name not in ("keys", "values", "rotary")]
    others = [name for name in asked if name not in of_rows]
    parts = [f"{rows}: {', '.join(of_rows)}"] if rows else []
    return "; ".join([*parts, *([", ".join(others)] if others else [])]) or "nothing"


def parameters_of(factory: type[Any]) -> tuple[Parameter, ...]:
    """Fields of a scorer or allocator class with type, default and the text below them."""
    types, texts = parameter_types(factory), field_texts(factory)
    return tuple(
        Parameter(f.name, _type_name(types[f.name]), _default(f), texts.get(f.name, ""))
        for f in dataclasses.fields(factory)
        if f.init
    )


def _part(kind: Kind, entry: Registered[ScorerPlugin] | Registered[AllocatorPlugin]) -> Description:
    factory = typing.cast("type[Any]", entry.record.factory)
    needs = _needs(factory)
    return Description(
        kind=kind,
        name=entry.record.name,
        summary=entry.record.summary,
        paper=entry.record.paper,
        provider=_release(entry),
        parameters=parameters_of(factory),
        query_aware=factory.query_aware if kind == "scorer" else None,
        needs=describe_needs(needs) if needs else "depends on its parameters",
        text=inspect.cleandoc(factory.__doc__ or ""),
        prefix_hit=getattr(factory, "prefix_hit", ""),
    )


def _recipe(registry: Registry, entry: Registered[RecipePlugin]) -> Description:
    recipe = entry.record
    values = dict(recipe.params)
    default = Selection()
    for f in dataclasses.fields(Selection):
        if getattr(recipe.selection, f.name) != getattr(default, f.name):
            values[f.name] = getattr(recipe.selection, f.name)
    scorer = registry.scorers.get(recipe.scorer)
    return Description(
        kind="policy",
        name=recipe.name,
        summary=recipe.summary,
        paper=recipe.paper,
        provider=_release(entry),
        parameters=tuple(Parameter(name, type(value).__name__, _shown(value)) for name, value in values.items()),
        query_aware=getattr(scorer.record.factory, "query_aware", None) if scorer else None,
        parts=f"{recipe.scorer} x {recipe.allocator}",
        variants=tuple(
            f"{name} ({', '.join(f'{key}={_shown(value)}' for key, value in changes.items())})"
            for name, changes in recipe.variants.items()
        ),
    )


def _release(entry: Registered[Any]) -> str:
    return f"{entry.provider.distribution} {entry.provider.version}"


def _needs(factory: type[Any]) -> Needs | None:
    needs = needs_of(factory)
    if isinstance(needs, Needs):
        return needs
    try:
        needs = needs_of(factory())
    except Exception:  # a stranger's class, or a parameter without default
        return None
    return needs if isinstance(needs, Needs) else None


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is not dataclasses.MISSING:
        return _shown(f.default)
    return "required" if f.default_factory is dataclasses.MISSING else _shown(f.default_factory())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value == "":
        return "empty"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def field_texts(factory: type[Any]) -> dict[str, str]:
    """The string literals below the fields of a dataclass or named tuple, its bases included."""
    texts: dict[str, str] = {}
    for cls in reversed(factory.__mro__):
        if not dataclasses.is_dataclass(cls) and not hasattr(cls, "_fields"):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        except (OSError, TypeError, SyntaxError):  # no source at hand
            continue
        assert isinstance(body, ast.ClassDef)
        for field, text in itertools.pairwise(body.body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts
