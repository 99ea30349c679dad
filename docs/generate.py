"""Writes the tables of docs/policies.md from the registry, and README's table of flags: ``python docs/generate.py``.

Only what this distribution provides is listed, whatever else is installed.
"""

from __future__ import annotations

import re
from pathlib import Path

from vlcache_sgl.config import FLAGS, Flag
from vlcache_sgl.policy import registry
from vlcache_sgl.policy.describe import Description, describe

PAGE = Path(__file__).with_name("policies.md")
README = Path(__file__).parents[1] / "README.md"
OWN = "vlcache-sgl"


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
    README.write_text(rendered_readme(README.read_text()))
