"""Results are files: what each must say about itself, and the way to write one."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, get_args, get_origin, get_type_hints

from benchmarks.common.host import PACKAGES, ROOT, Host

RESULTS = ROOT / "benchmarks/results"
"""Committed results; tables of the pages are made from these alone."""
OUT = ROOT / "out"
"""Everything that is not committed."""


class Result(TypedDict):
    """What every result has, beside what its benchmark adds."""

    task: str
    command: str
    """As typed from the root of the repository."""
    host: Host


def problems(result: Mapping[str, Any]) -> list[str]:
    """What a result that is committed lacks, a line each; empty when it is whole.

    Beside the types of `Result` and `Host`: a time with its zone, a commit, and a version or null for every package.
    """
    found = _wrong(result, Result)
    host = result.get("host")
    if not isinstance(host, Mapping):
        return found
    found += [f"host.{line}" for line in _wrong(host, Host)]
    packages = host.get("packages")
    if isinstance(packages, Mapping):
        found += [f"host.packages lacks {name}" for name in PACKAGES if name not in packages]
        found += [f"host.packages.{name} is no version: {v!r}" for name, v in packages.items() if not _version(v)]
    if not host.get("commit"):
        found.append("host.commit is empty")
    if isinstance(date := host.get("date"), str) and not _zoned(date):
        found.append(f"host.date is no time with a zone: {date!r}")
    return found


def _wrong(record: Mapping[str, Any], schema: type) -> list[str]:
    """Fields of a typed dictionary that a record lacks or has with another type."""
    lines = []
    for name, hint in get_type_hints(schema).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        # Neither a dict of types nor a typed dict is a class at run time.
        kinds = tuple(dict if get_origin(kind) is dict or kind is Host else kind for kind in kinds)
        if name not in record:
            lines.append(f"{name} is missing")
        elif not isinstance(record[name], kinds) or (isinstance(record[name], bool) and bool not in kinds):
            lines.append(f"{name} is {type(record[name]).__name__}, wanted {hint}")
    return lines


def _version(value: object) -> bool:
    return value is None or (isinstance(value, str) and value[:1].isdigit())


def _zoned(text: str) -> bool:
    try:
        return datetime.datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def folder(asked: Path | None, whole: bool) -> Path:
    """Where a result goes: as asked, else to the committed ones if the run was a whole one, else to `OUT`."""
    return asked or (RESULTS if whole else OUT)


def save(path: Path, result: Mapping[str, Any], text: str | None = None) -> str:
    """Write a result, as `text` where its benchmark lays out its JSON by itself; returns how to name the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((json.dumps(result, indent=1) if text is None else text).rstrip("\n") + "\n")
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
