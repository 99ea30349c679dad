"""Writes what follows from the code: ``python docs/generate.py``.

The tables of docs/policies.md come from the registry (only what this distribution provides is listed, whatever else is
installed), docs/reference-policy.md from the classes of `vlcache_sgl.api` and the texts below their fields, README's
table of flags from the flags' records, the table of docs/metrics.md from the declarations of statistics.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from vlcache_sgl.api import Budget, Grid, LayerView, Needs, Patches, Prompt, Rows, Selection
from vlcache_sgl.config import FLAGS, Flag
from vlcache_sgl.counters import Figure
from vlcache_sgl.policy import registry
from vlcache_sgl.policy.describe import Description, describe, field_texts
from vlcache_sgl.sglang_hooks.metrics import FIGURES, PREFIX

PAGE = Path(__file__).with_name("policies.md")
README = Path(__file__).parents[1] / "README.md"
METRICS = Path(__file__).with_name("metrics.md")
OWN = "vlcache-sgl"
REFERENCE = Path(__file__).with_name("reference-policy.md")
CLASSES = (Prompt, LayerView, Budget, Needs, Rows, Selection, Grid, Patches)
"""What a policy reads, declares and returns; the reference has a section for each."""
INTRODUCTION = """# What a policy sees

Written by `docs/generate.py` from `vlcache_sgl.api`; [the tutorial](writing-a-policy.md) says how it goes together.

Letters: `H` query heads, `K` KV heads, `D` head dim, `L` layers, `R` rows that vote, `n` tokens of the prompt,
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
    for name, text in tables.items():
        page = between_markers(page, name, text)
    return page


def rendered_readme(page: str) -> str:
    """`page` with its table of flags made anew."""
    rows = [(flag_with_values(flag), flag_meaning(flag), flag.default) for flag in FLAGS]
    return between_markers(page, "flags", table(("flag", "meaning", "default"), rows))


def rendered_metrics(page: str) -> str:
    """`page` with its table of figures made anew."""
    rows = [
        (code(published(figure)), figure.kind, ", ".join(map(code, figure.labels)), figure.text) for figure in FIGURES
    ]
    return between_markers(page, "figures", table(("metric", "type", "further labels", "meaning"), rows))


def published(figure: Figure) -> str:
    """The name under which Prometheus finds it."""
    return PREFIX + figure.name + ("_total" if figure.kind == "counter" else "")


def flag_with_values(flag: Flag) -> str:
    return code(f"{flag.name} {flag.values.metavar}".rstrip())


def flag_meaning(flag: Flag) -> str:
    # Choices stand beside the flag already.
    plain = flag.switch or "|" in flag.values.metavar
    return flag.help if plain else f"{flag.help}: {flag.values.words}"


def between_markers(page: str, name: str, text: str) -> str:
    page, count = re.subn(
        rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)",
        lambda match: f"{match[1]}{text}\n{match[2]}",
        page,
        flags=re.DOTALL,
    )
    assert count == 1, f"the page needs one pair of markers for {name}"
    return page


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


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
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
    METRICS.write_text(rendered_metrics(METRICS.read_text()))
    README.write_text(rendered_readme(README.read_text()))
    REFERENCE.write_text(reference())
