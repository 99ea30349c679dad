"""The text that names a policy: ``NAME``, ``NAME:variant,key=value`` or ``scorer=A,allocator=B,key=value``."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from vlcache_sgl.api.records import AllocatorPlugin, ScorerPlugin, Selection
from vlcache_sgl.policy.checks import is_optional, parameter_types, strip_optional
from vlcache_sgl.policy.errors import PolicyError
from vlcache_sgl.spelling import did_you_mean

SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Spec:
    """A parsed text; values are still text."""

    name: str | None
    """Recipe, or None for a free composition."""
    scorer: str | None
    allocator: str | None
    variants: tuple[str, ...]
    settings: Mapping[str, str]


def parse(text: str) -> Spec:
    """Take the text apart; names and values are not looked at.

    Raises:
        PolicyError: when it has neither form.
    """
    problem = PolicyError(
        f"cannot read policy {text!r}: expected NAME, NAME:variant-or-key=value,... "
        "or scorer=A,allocator=B,key=value,..."
    )
    head, colon, tail = text.strip().partition(":")
    composed = "=" in head
    items = [item.strip() for item in (text.strip() if composed else tail).split(",")]
    if (not composed and not head) or ((composed or colon) and not all(items)):
        raise problem
    settings: dict[str, str] = {}
    variants: list[str] = []
    for item in filter(None, items):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            variants.append(key)
        elif not key or not value:
            raise problem
        elif key in settings:
            raise PolicyError(f"policy {text!r} sets {key!r} twice")
        else:
            settings[key] = value
    if not composed:
        return Spec(head.strip(), None, None, tuple(variants), settings)  # `scorer=` and `allocator=` replace a part
    scorer, allocator = settings.pop("scorer", None), settings.pop("allocator", None)
    if variants or scorer is None or allocator is None:
        raise problem
    return Spec(None, scorer, allocator, (), settings)


@dataclass(frozen=True)
class Owner:
    """Something that has parameters: the scorer, the allocator or the selection."""

    role: Literal["scorer", "allocator", "selection"]
    title: str
    """For messages, for instance ``scorer snapkv``."""
    factory: type[Any]

    @property
    def parameters(self) -> dict[str, Any]:
        return parameter_types(self.factory)

    def is_guarded(self, key: str) -> bool:
        """Whether only the operator may set this field, not a request (a file name, for instance)."""
        return any(f.name == key and f.metadata.get("operator_only") for f in dataclasses.fields(self.factory))


def part_owners(scorer: ScorerPlugin, allocator: AllocatorPlugin) -> tuple[Owner, Owner, Owner]:
    """Scorer, allocator and selection of one policy."""
    return (
        Owner("scorer", f"scorer {scorer.name}", cast("type[Any]", scorer.factory)),
        Owner("allocator", f"allocator {allocator.name}", cast("type[Any]", allocator.factory)),
        Owner("selection", "selection", Selection),
    )


Values = dict[str, dict[str, Any]]
"""Role -> keyword arguments."""


@dataclass(frozen=True)
class Settings:
    """What one layer of a policy's definition sets: a recipe, a variant or the user."""

    given: Mapping[str, Any]
    from_request: bool = False


def assign(settings: Mapping[str, Any], owners: tuple[Owner, ...], *, from_request: bool = False) -> Values:
    """Give every setting to the one owner that has a field of this name and convert texts to the field's type.

    Args:
        settings: ``key`` or ``role.key`` -> text, or an already typed value from a recipe.
        owners: scorer, allocator, selection.
        from_request: refuse fields that only the operator may set.

    Raises:
        PolicyError: unknown key (with the choices), ambiguous key, or a text that is not of the field's type.
    """
    result: Values = {owner.role: {} for owner in owners}
    for key, value in settings.items():
        owner, name = _owner(key, owners)
        if from_request and owner.is_guarded(name):
            raise PolicyError(f"{key} of {owner.title} can only be set by --kv-policy, not by a request")
        hint = owner.parameters[name]
        result[owner.role][name] = _convert(value, hint, f"{key} of {owner.title}") if isinstance(value, str) else value
    return result


def _owner(key: str, owners: tuple[Owner, ...]) -> tuple[Owner, str]:
    role, dot, name = key.rpartition(".")
    holders = [owner for owner in owners if name in owner.parameters and (not dot or owner.role == role)]
    if len(holders) == 1:
        return holders[0], name
    if holders:
        ways = " or ".join(f"{owner.role}.{name}=" for owner in holders)
        raise PolicyError(f"{key} belongs to {' and '.join(owner.title for owner in holders)}: write {ways}")
    choices = "; ".join(f"{owner.title}: {', '.join(owner.parameters) or 'none'}" for owner in owners)
    meant = did_you_mean(name, [known for owner in owners for known in owner.parameters])
    raise PolicyError(f"unknown parameter {key!r}{meant}; choose from: {choices}")


def _convert(text: str, hint: Any, what: str) -> Any:
    if is_optional(hint) and text.lower() == "none":
        return None
    hint = strip_optional(hint)
    if typing.get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        if text not in choices:
            raise PolicyError(f"{what} must be one of {', '.join(choices)}, got {text!r}{did_you_mean(text, choices)}")
        return choices[text]
    try:
        return SWITCHES[text.lower()] if hint is bool else hint(text)
    except (ValueError, KeyError):
        expected = "true or false" if hint is bool else {int: "a whole number", float: "a number"}.get(hint, hint)
        raise PolicyError(f"{what} must be {expected}, got {text!r}") from None
