"""Writes what follows from the code: ``python docs/generate.py``.

The tables of docs/policies.md come from the registry (only what this distribution provides is listed, whatever else is
installed), docs/reference-policy.md from the classes of `vlcache_sgl.api` and the texts below their fields, README's
table of flags from the flags' records.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlcache_sgl.api import Budget, Grid, LayerView, Needs, Patches, Prompt, Rows, Selection
from vlcache_sgl.config import FLAGS, Flag
from vlcache_sgl.policy import registry
from vlcache_sgl.policy.describe import Description, describe, field_texts

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.common.pages import with_block, with_blocks  # noqa: E402

PAGE = Path(__file__).with_name("policies.md")
README = ROOT / "README.md"
OWN = "vlcache-sgl"
REFERENCE = Path(__file__).with_name("reference-policy.md")
CLASSES = (Prompt, LayerView, Budget, Needs, Rows, Selection, Grid, Patches)
"""What a policy reads, declares and returns; the reference has a section for each."""
INTRODUCTION = """# What a policy sees

Written by `docs/generate.py` from `vlcache_sgl.api`; [the tutorial](writing-a-policy.md) says how it goes together.

Letters: `H` query heads, `K` KV heads, `D` head dim, `L` layers, `R` query rows, `n` tokens of the prompt,
`m = n - start` *owned* tokens, those that this request computed itself and may evict. `[K, m]` is a tensor of
that shape.
"""


def rendered(page: str) -> str:
    """`page` with the text between its markers made anew."""
    own = [item for item in describe(registry()) if item.provider.split()[0] == OWN]
    tables = {
        "policies": table(
            ("name", "made of", "its own defaults", "variants", "paper", "in a sentence"),
            [
                (code(i.name), i.parts, parameters(i), ", ".join(i.variants), links(i.paper), i.summary)
                for i in own
                if i.kind == "policy"
            ],
        ),
        "scorers": table(
            ("name", "needs", "query-aware", "parameters", "paper", "in a sentence"),
            [
                (code(i.name), i.needs, "yes" if i.query_aware else "no", parameters(i), links(i.paper), i.summary)
                for i in own
                if i.kind == "scorer"
            ],
        ),
        "allocators": table(
            ("name", "needs", "parameters", "paper", "in a sentence"),
            [(code(i.name), i.needs, parameters(i), links(i.paper), i.summary) for i in own if i.kind == "allocator"],
        ),
        "prefix": "\n".join(f"* {i.kind} `{i.name}`: {i.prefix_hit}." for i in own if i.prefix_hit),
    }
    return with_blocks(page, tables)


def rendered_readme(page: str) -> str:
    """`page` with its table of flags made anew."""
    rows = [(flag_with_values(flag), flag_meaning(flag), flag.default) for flag in FLAGS]
    return with_block(page, "flags", table(("flag", "meaning", "default"), rows))


def flag_with_values(flag: Flag) -> str:
    return code(f"{flag.name} {flag.values.metavar}".rstrip())


def flag_meaning(flag: Flag) -> str:
    # Choices stand beside the flag already.
    plain = flag.switch or "|" in flag.values.metavar
    return flag.help if plain else f"{flag.help}: {flag.values.words}"


def reference() -> str:
    """The whole page of classes."""
    return "\n".join([INTRODUCTION, *map(section, CLASSES)])


def section(cls: type[Any]) -> str:
    """A class: its text, its fields, what it computes."""
    texts = field_texts(cls)
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else list(cls._fields)
    rows = [(code(name), code(type_name(cls, name)), prose(texts.get(name, ""))) for name in names]
    parts = [f"## {cls.__name__}", "", prose(inspect.cleandoc(cls.__doc__ or "")), ""]
    parts += [table(("field", "type", "meaning"), rows), ""]
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        called = "" if isinstance(member, property) else str(inspect.signature(function)).partition(" -> ")[0]
        called = re.sub(r"\((self|cls)(, )?", "(", called).replace("'", "")
        parts += [f"* `{name}{called}`: {prose(inspect.cleandoc(function.__doc__ or ''))}"]
    return "\n".join(parts).rstrip() + "\n"


def type_name(cls: type[Any], name: str) -> str:
    hint = next(base.__annotations__[name] for base in cls.__mro__ if name in getattr(base, "__annotations__", {}))
    return str(getattr(hint, "__forward_arg__", hint))


def prose(text: str) -> str:
    """Docstring to Markdown, on one line."""
    return " ".join(text.replace("``", "`").split())


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines: list[tuple[str, ...]] = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def parameters(item: Description) -> str:
    return ", ".join(f"`{p.name}={p.default}`" for p in item.parameters)


def links(paper: str) -> str:
    numbers = [number.strip() for number in paper.split(",") if number.strip()]
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in numbers)


def code(text: str) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
    README.write_text(rendered_readme(README.read_text()))
    REFERENCE.write_text(reference())
