"""Writes what follows from the code: ``python docs/generate.py``.

The tables of docs/policies.md come from the registry (only what this distribution provides is listed, whatever else is
installed), docs/reference-policy.md from the classes of `vlcache_sgl.api` and the texts below their fields, README's
table of flags from the flags' records, the table of docs/metrics.md from the declarations of statistics, that of
docs/models.md from models/matrix.toml, the tables of docs/architecture.md from the source.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlcache_sgl.api import Budget, Grid, LayerView, Needs, Patches, Prompt, Rows, Selection
from vlcache_sgl.config import FLAGS, Flag
from vlcache_sgl.counters import Figure
from vlcache_sgl.policy import registry
from vlcache_sgl.policy.describe import Description, describe, field_texts
from vlcache_sgl.sglang_hooks.metrics import FIGURES, PREFIX

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.common.pages import with_block, with_blocks  # noqa: E402
from models import matrix  # noqa: E402

PAGE = Path(__file__).with_name("policies.md")
README = ROOT / "README.md"
METRICS = Path(__file__).with_name("metrics.md")
MODELS = Path(__file__).with_name("models.md")
ARCHITECTURE = Path(__file__).with_name("architecture.md")
SOURCES = tuple(ROOT / folder for folder in ("src/vlcache_sgl", "policies/vlcache_policies", "kernels/vlcache_kernels"))
OWN = "vlcache-sgl"
REFERENCE = Path(__file__).with_name("reference-policy.md")
CLASSES = (Prompt, LayerView, Budget, Needs, Rows, Selection, Grid, Patches)
"""What a policy reads, declares and returns; the reference has a section for each."""
INTRODUCTION = """# What a policy sees

For authors of policies: every field that a policy reads, declares and returns. Written by `docs/generate.py` from
`vlcache_sgl.api`; [the tutorial](writing-a-policy.md) says how it goes together.

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


def rendered_metrics(page: str) -> str:
    """`page` with its table of figures made anew."""
    rows = [
        (code(published(figure)), figure.kind, ", ".join(map(code, figure.labels)), figure.text) for figure in FIGURES
    ]
    return with_block(page, "figures", table(("metric", "type", "further labels", "meaning"), rows))


def rendered_models(page: str) -> str:
    """`page` with its table of architectures made anew.

    Raises:
        ValueError: a row claims what no test shows.
    """
    rows = matrix.read_rows()
    if found := list(matrix.problems(rows)):
        raise ValueError("; ".join(found))
    return with_blocks(page, {"matrix": table(matrix.HEAD, [*map(matrix.cells, rows)]), "notes": matrix.notes(rows)})


def published(figure: Figure) -> str:
    """The name under which Prometheus finds it."""
    return PREFIX + figure.name + ("_total" if figure.kind == "counter" else "")


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


def rendered_architecture(page: str) -> str:
    """`page` with its tables of folders, of their imports and of sizes made anew."""
    paths = sorted(path for source in SOURCES for path in source.rglob("*.py"))
    for name, text in (("tree", tree(paths)), ("imports", import_graph(paths)), ("sizes", sizes(paths))):
        page = with_block(page, name, text)
    return page


def tree(paths: list[Path]) -> str:
    """A line per folder: what its `__init__.py` says it is, its files and lines, without those of folders in it."""
    lines: dict[Path, list[int]] = defaultdict(list)
    for path in paths:
        lines[path.parent].append(line_count(path))
    rows = [
        (in_repository(folder, "/"), first_sentence(folder / "__init__.py"), str(len(counts)), str(sum(counts)))
        for folder, counts in sorted(lines.items())
    ]
    rows.append(("together", "", str(len(paths)), str(sum(sum(counts) for counts in lines.values()))))
    return table(("folder", "what it is", "files", "lines"), rows)


def import_graph(paths: list[Path]) -> str:
    """Which folders each folder imports, and in how many of its files; inside functions and for types too."""
    walker = module_at(ROOT / "tests/test_imports.py")
    graph: dict[str, Counter[str]] = defaultdict(Counter)
    for path in paths:
        source = next(source for source in SOURCES if path.is_relative_to(source))
        own = room((source.name, *path.relative_to(source).with_suffix("").parts))
        graph[own].update({room(tuple(module.split("."))) for module in walker.imports(path)} - {own, ""})
    rows = [
        (code(own), ", ".join(f"{code(other)} {count}" for other, count in sorted(found.items())))
        for own, found in sorted(graph.items())
    ]
    return table(("folder", "imports, and in how many of its files"), rows)


def room(module: tuple[str, ...]) -> str:
    """The folder that a module lies in, by the name it has in the import graph; empty for other people's modules."""
    if module[0] != SOURCES[0].name:
        return module[0] if module[0] in (*(source.name for source in SOURCES), "sglang") else ""
    inside = len(module) > 1 and (SOURCES[0] / module[1]).is_dir()
    return module[1] if inside else "vlcache_sgl"


def sizes(paths: list[Path]) -> str:
    """The longest file, and the functions with most ways through them, by ruff's count (McCabe)."""
    longest = max(paths, key=line_count)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "C901", "--output-format", "json"]
    command += ["--exit-zero", "--config", "lint.mccabe.max-complexity=1", *map(str, SOURCES)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    rows = [("longest file", in_repository(longest), f"{line_count(longest)} lines")]
    for what, inside in (("most complex function in `kernels/`", True), ("most complex function elsewhere", False)):
        ways, name, path = max(f for f in map(complexity, found) if f[2].is_relative_to(SOURCES[2]) == inside)
        rows.append((what, f"{code(name)} in {in_repository(path)}", f"{ways} ways"))
    return table(("what", "where", "how much"), rows)


def complexity(finding: dict[str, Any]) -> tuple[int, str, Path]:
    """Ways through a function, its name and its file, of a finding of ruff's rule C901."""
    match = re.match(r"`(\w+)` is too complex \((\d+) >", finding["message"])
    assert match is not None
    return int(match[2]), match[1], Path(finding["filename"])


def in_repository(path: Path, suffix: str = "") -> str:
    return code(f"{path.relative_to(ROOT)}{suffix}")


def line_count(path: Path) -> int:
    return len(path.read_text().splitlines())


def first_sentence(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def module_at(path: Path) -> Any:
    """A module that is in no package, by its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    ARCHITECTURE.write_text(rendered_architecture(ARCHITECTURE.read_text()))
    PAGE.write_text(rendered(PAGE.read_text()))
    METRICS.write_text(rendered_metrics(METRICS.read_text()))
    MODELS.write_text(rendered_models(MODELS.read_text()))
    README.write_text(rendered_readme(README.read_text()))
    REFERENCE.write_text(reference())
