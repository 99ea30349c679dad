"""Replacing attributes of another package: resolve all, install all, verify all, and undo.

SGLang logs and ignores errors of plugins, which would serve uncompressed without anybody noticing.  So nothing is
installed unless every target resolves, and `verify` says whether all patches are still in place.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

How = Literal["before", "after", "around", "replace"]


class PatchError(RuntimeError):
    """A target is missing or a patch was undone by somebody else; the message names it."""


@dataclass(frozen=True)
class PatchPoint:
    """One attribute that we replace.

    `hook` is called, by `how`:
        ``before``: ``hook(*args, **kwargs)`` ahead of the original.
        ``after``: ``hook(result, *args, **kwargs)``; what it returns (unless None) replaces the result.
        ``around``: ``hook(original, *args, **kwargs)`` instead of the original.
        ``replace``: the attribute becomes ``hook(original)``.
    """

    target: str
    """``package.module:Class.attribute``, ``package.module:function`` or ``package.module:DICT[key]``."""
    how: How
    hook: Callable[..., Any]
    why: str
    """What stops working without it."""


@dataclass(frozen=True)
class _Place:
    owner: Any
    name: str
    is_item: bool
    raw: Any
    """What is stored there: a function, a staticmethod, a property, any object."""

    def put(self, value: Any) -> None:
        if self.is_item:
            self.owner[self.name] = value
        else:
            setattr(self.owner, self.name, value)

    def get(self) -> Any:
        if self.is_item:
            return self.owner[self.name]
        return inspect.getattr_static(self.owner, self.name)


def locate(target: str) -> _Place:
    """Find a target without calling anything.

    Raises:
        PatchError: when a part of the path does not exist.
    """
    module_name, _, path = target.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
        path, _, key = path.partition("[")
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        if key:
            owner, name = getattr(owner, name), key.rstrip("]").strip("'\"")
            return _Place(owner, name, True, owner[name])
        return _Place(owner, name, False, inspect.getattr_static(owner, name))
    except (ImportError, AttributeError, KeyError) as error:
        raise PatchError(f"{target} does not exist in this SGLang ({type(error).__name__}: {error})") from error


class Patches:
    """A set of patch points that are installed together."""

    def __init__(self, points: Sequence[PatchPoint]) -> None:
        self._points = tuple(points)
        self._installed: list[tuple[PatchPoint, _Place, Any]] = []

    def install(self) -> None:
        """Install all, or nothing.

        Raises:
            PatchError: naming every target that does not exist.
        """
        if self._installed:
            return
        problems = []
        places = []
        for point in self._points:
            try:
                places.append(locate(point.target))
            except PatchError as error:
                problems.append(f"{error}; needed for: {point.why}")
        if problems:
            raise PatchError("; ".join(problems))
        for point, place in zip(self._points, places, strict=True):
            patched = _wrap(point, place.raw)
            place.put(patched)
            self._installed.append((point, place, patched))

    def verify(self) -> None:
        """Check that every patch is in place.

        Raises:
            PatchError: naming the targets that are not.
        """
        missing = [point.target for point, place, patched in self._installed if place.get() is not patched]
        if missing or not self._installed:
            raise PatchError("patched by somebody else or never installed: " + ", ".join(missing or ["everything"]))

    def uninstall(self) -> None:
        """Put everything back as it was."""
        for _, place, _ in reversed(self._installed):
            place.put(place.raw)
        self._installed.clear()


def _wrap(point: PatchPoint, raw: Any) -> Any:
    if point.how == "replace":
        return point.hook(raw)
    kind = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
    original = raw.__func__ if kind is not None else raw
    hook = point.hook

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        if point.how == "before":
            hook(*args, **kwargs)
            return original(*args, **kwargs)
        if point.how == "around":
            return hook(original, *args, **kwargs)
        result = original(*args, **kwargs)
        changed = hook(result, *args, **kwargs)
        return result if changed is None else changed

    return kind(patched) if kind is not None else patched
