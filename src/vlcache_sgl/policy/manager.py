"""Finds the plugins of entry-point group ``vlcache_sgl`` and keeps what they register under its names.

A plugin that cannot be used is a *problem*: it is described, with the distribution that brought it, and everything
else stays listable.  Resolving a policy while there are problems fails: a server must not start half loaded.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import pluggy

from vlcache_sgl.api import hookspecs
from vlcache_sgl.api.records import AllocatorPlugin, RecipePlugin, ScorerPlugin
from vlcache_sgl.policy.checks import allocator_problem, scorer_problem
from vlcache_sgl.policy.errors import PolicyError
from vlcache_sgl.policy.spec import Owner, Settings, Values, assign, part_owners
from vlcache_sgl.spelling import did_you_mean

GROUP = hookspecs.PROJECT

NAME = re.compile(r"[a-z][a-z0-9_-]*")

Record = TypeVar("Record", ScorerPlugin, AllocatorPlugin, RecipePlugin)


@dataclass(frozen=True)
class Provider:
    """The installed distribution and entry point that something comes from."""

    distribution: str
    version: str
    entry_point: str
    """``name = module``, as in the distribution's metadata."""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} (entry point {self.entry_point})"


@dataclass(frozen=True)
class Registered(Generic[Record]):
    """A record and where it comes from."""

    record: Record
    provider: Provider


@dataclass(frozen=True)
class Registry:
    """Everything that is installed, by name."""

    scorers: Mapping[str, Registered[ScorerPlugin]] = field(default_factory=dict)
    allocators: Mapping[str, Registered[AllocatorPlugin]] = field(default_factory=dict)
    recipes: Mapping[str, Registered[RecipePlugin]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    """One line per plugin or record that cannot be used."""

    def scorer(self, name: str) -> Registered[ScorerPlugin]:
        """Raises `PolicyError` with the choices when there is none of this name; so do the next two."""
        return _find("scorer", name, self.scorers)

    def allocator(self, name: str) -> Registered[AllocatorPlugin]:
        return _find("allocator", name, self.allocators)

    def recipe(self, name: str) -> Registered[RecipePlugin]:
        return _find("policy", name, self.recipes)

    def require_sound(self) -> None:
        """Raises `PolicyError` naming every broken plugin."""
        if self.problems:
            raise PolicyError("broken policy plugins (fix or uninstall them): " + "; ".join(self.problems))


@functools.cache
def registry() -> Registry:
    """The installed plugins; entry points are imported on the first call, once per process."""
    return load_registry()


def load_registry() -> Registry:
    """Import every entry point of the group now and collect what they register."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    problems: list[str] = []
    providers: dict[str, Provider] = {}
    for entry in _entry_points():
        provider = _provider(entry)
        if problem := _register(manager, entry, str(provider)):
            problems.append(f"{provider}: {problem}")
        else:
            providers[str(provider)] = provider
    collect = functools.partial(_collect, manager, providers, problems)
    scorers = collect("vlcache_scorers", ScorerPlugin, _scorer_problem)
    allocators = collect("vlcache_allocators", AllocatorPlugin, _allocator_problem)
    recipe_problem = functools.partial(_recipe_problem, scorers, allocators)
    recipes = collect("vlcache_recipes", RecipePlugin, recipe_problem)
    return Registry(scorers, allocators, recipes, tuple(problems))


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    """In an order that does not depend on the file system, our own first: of two equal names the built-in stays."""

    def order(entry: importlib.metadata.EntryPoint) -> tuple[bool, str, str]:
        name = _provider(entry).distribution
        return (name != "vlcache-sgl", name, entry.name)

    return sorted(importlib.metadata.entry_points(group=GROUP), key=order)


def _provider(entry: importlib.metadata.EntryPoint) -> Provider:
    name, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown distribution", "?")
    return Provider(name, version, f"{entry.name} = {entry.value}")


def _register(manager: pluggy.PluginManager, entry: importlib.metadata.EntryPoint, name: str) -> str | None:
    """Import one entry point and hand it to pluggy; what is wrong with it, or None."""
    try:
        plugin = entry.load()
    except Exception as error:
        return f"cannot be imported: {type(error).__name__}: {error}"
    hooks = [hook for hook in vars(hookspecs) if hook.startswith("vlcache_")]
    try:
        manager.register(plugin, name=name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        if manager.has_plugin(name):
            manager.unregister(name=name)
        reason = " ".join(str(error).split("\n", 1)[-1].split())
        return f"does not fit the hooks {', '.join(hooks)}: {reason}"
    except ValueError as error:
        return f"cannot be registered: {error}"
    marked = {caller.name for caller in manager.get_hookcallers(plugin) or []}
    if forgotten := [hook for hook in hooks if hasattr(plugin, hook) and hook not in marked]:
        return f"{', '.join(forgotten)} lacks the @hookimpl decorator"
    return None if marked else f"offers none of the hooks {', '.join(hooks)}"


def _collect(
    manager: pluggy.PluginManager,
    providers: Mapping[str, Provider],
    problems: list[str],
    hook: str,
    kind: type[Record],
    problem_of: Callable[[Record], str | None],
) -> Mapping[str, Registered[Record]]:
    found: dict[str, Registered[Record]] = {}
    by_provider = {impl.plugin_name: impl for impl in getattr(manager.hook, hook).get_hookimpls()}
    for name, provider in providers.items():
        if name not in by_provider:
            continue
        try:
            # One plugin at a time, so that an exception has an owner; the order is that of `_entry_points`.
            records: Iterable[Any] = list(by_provider[name].function())
        except Exception as error:
            problems.append(f"{provider}: {hook}() raised {type(error).__name__}: {error}")
            continue
        for record in records:
            if problem := _record_problem(record, kind, found) or problem_of(record):
                problems.append(f"{provider}: {hook}(): {problem}")
            else:
                found[record.name] = Registered(record, provider)
    return MappingProxyType(dict(sorted(found.items())))


def _record_problem(record: object, kind: type[Record], found: Mapping[str, Registered[Record]]) -> str | None:
    if not isinstance(record, kind):
        return f"yielded {record!r}, expected a {kind.__name__}"
    if not isinstance(record.name, str) or not NAME.fullmatch(record.name):
        return f"bad name {record.name!r}, expected small letters, digits, _ and -"
    if record.name in found:
        return f"the name {record.name!r} is already taken by {found[record.name].provider}"
    return None


def _scorer_problem(record: ScorerPlugin) -> str | None:
    return scorer_problem(f"scorer {record.name!r}", record.factory)


def _allocator_problem(record: AllocatorPlugin) -> str | None:
    return allocator_problem(f"allocator {record.name!r}", record.factory)


def _recipe_problem(
    scorers: Mapping[str, Registered[ScorerPlugin]],
    allocators: Mapping[str, Registered[AllocatorPlugin]],
    record: RecipePlugin,
) -> str | None:
    """Whether a recipe names parts and parameters that are there; what a user adds is not looked at."""
    try:
        for variant in ({}, *record.variants.values()):
            layers = (Settings(record.params), Settings(variant))
            put_together(scorers, allocators, record.scorer, record.allocator, layers)
    except PolicyError as error:
        return f"policy {record.name!r}: {error}"
    return None


@dataclass(frozen=True)
class Parts:
    """What a policy is made of, before it is built."""

    scorer: str
    allocator: str
    owners: tuple[Owner, Owner, Owner]
    """Scorer, allocator, selection."""
    values: Values


def put_together(
    scorers: Mapping[str, Registered[ScorerPlugin]],
    allocators: Mapping[str, Registered[AllocatorPlugin]],
    scorer: str,
    allocator: str,
    layers: Iterable[Settings],
) -> Parts:
    """Apply settings one after the other.  ``scorer`` and ``allocator`` among them replace a part, with whatever had
    been set for the one before.

    Raises:
        PolicyError: a name or a value that is not there.
    """
    names = {"scorer": scorer, "allocator": allocator}
    values: Values = {"scorer": {}, "allocator": {}, "selection": {}}
    for layer in layers:
        given = dict(layer.given)
        for role in names:
            if (name := given.pop(role, names[role])) != names[role]:
                names[role] = str(name)
                values[role] = {}
        owners = _owners(scorers, allocators, names)
        for role, changes in assign(given, owners, from_request=layer.from_request).items():
            values[role].update(changes)
    return Parts(names["scorer"], names["allocator"], _owners(scorers, allocators, names), values)


def _owners(
    scorers: Mapping[str, Registered[ScorerPlugin]],
    allocators: Mapping[str, Registered[AllocatorPlugin]],
    names: Mapping[str, str],
) -> tuple[Owner, Owner, Owner]:
    scorer, allocator = _find("scorer", names["scorer"], scorers), _find("allocator", names["allocator"], allocators)
    return part_owners(scorer.record, allocator.record)


def _find(what: str, name: str, choices: Mapping[str, Registered[Record]]) -> Registered[Record]:
    if name in choices:
        return choices[name]
    listed: dict[str, list[str]] = {}
    for choice, registered in choices.items():
        listed.setdefault(registered.provider.distribution, []).append(choice)
    offers = "; ".join(f"{', '.join(names)} (from {distribution})" for distribution, names in listed.items())
    meant = did_you_mean(name, choices)
    raise PolicyError(f"unknown {what} {name!r}{meant}; choose from: {offers or 'nothing is installed'}")
