"""`vlcache policies`: what is installed; `vlcache policies NAME`: what it does and what can be set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlcache_sgl.policy.describe import Description, Parameter, describe
from vlcache_sgl.policy.manager import Registry, registry
from vlcache_sgl.spelling import did_you_mean

TITLES = {
    "policy": "Policies: --kv-policy NAME[:variant-or-key=value,...]",
    "scorer": "Scorers: --kv-policy scorer=NAME,allocator=NAME[,key=value,...]",
    "allocator": "Allocators",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 2 for an unknown name, 1 when a plugin is broken."""
    parser = argparse.ArgumentParser(
        prog="vlcache policies", description="List the installed policies, or explain one."
    )
    parser.add_argument("name", nargs="?", help="a policy, scorer or allocator")
    arguments = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 180)
    installed = registry()
    if arguments.name:
        return explain(arguments.name, installed, console)
    show_all(installed, console)
    return warn(installed)


def show_all(installed: Registry, console: Console) -> None:
    """Three tables: policies, scorers, allocators."""
    everything = describe(installed)
    for kind, title in TITLES.items():
        table = Table(title=title, title_justify="left", title_style="bold")
        parts = "made of" if kind == "policy" else "needs"
        for column in ("name", "in a sentence", parts, "query-aware", "parameters", "paper", "provider"):
            table.add_column(column, overflow="fold", no_wrap=column == "name")
        for item in (item for item in everything if item.kind == kind):
            table.add_row(
                item.name,
                escape(item.summary),
                escape(item.parts or item.needs),
                yes_or_no(item.query_aware),
                escape(", ".join(f"{p.name}={p.default}" for p in item.parameters)),
                item.paper,
                item.provider,
            )
        console.print(table)
    console.print("vlcache policies NAME explains one; every policy also takes the parameters of its parts.")


def explain(name: str, installed: Registry, console: Console) -> int:
    """Everything known under one name."""
    everything = describe(installed)
    found = [item for item in everything if item.name == name]
    if not found:
        names = sorted({item.name for item in everything})
        meant = did_you_mean(name, names)
        print(f"vlcache policies: nothing is called {name!r}{meant}; choose from: {', '.join(names)}", file=sys.stderr)
        return 2
    by_name = {(item.kind, item.name): item for item in everything}
    shown: list[Description] = []
    for item in found:
        scorer, _, allocator = item.parts.partition(" x ")
        parts = by_name.get(("scorer", scorer)), by_name.get(("allocator", allocator))
        shown += [part for part in (item, *parts) if part is not None and part not in shown]
    for item in shown:
        show_one(item, console)
    return warn(installed)


def show_one(item: Description, console: Console) -> None:
    """Head line, facts, docstring, parameters."""
    console.rule(f"{item.kind} {item.name}", align="left")
    facts = {
        "": item.summary,
        "made of": item.parts,
        "needs": item.needs,
        "query-aware": yes_or_no(item.query_aware),
        "after a prefix hit": item.prefix_hit,
        "variants": ", ".join(item.variants),
        "paper": paper_links(item.paper),
        "provider": item.provider,
    }
    for label, value in facts.items():
        if value:
            console.print(f"{label + ': ' if label else ''}{value}", markup=False, soft_wrap=True)
    if item.text:
        console.print("\n" + item.text, markup=False, soft_wrap=True)
    if item.parameters:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("parameter", "type", "default", ""):
            table.add_column(column, overflow="fold")
        for parameter in item.parameters:
            table.add_row(*map(escape, _row(parameter)))
        console.print()
        console.print(table)
    console.print()


def warn(installed: Registry) -> int:
    """Broken plugins on stderr; 1 if there are any."""
    for problem in installed.problems:
        print(f"broken plugin: {problem}", file=sys.stderr)
    return 1 if installed.problems else 0


def yes_or_no(value: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[value]


def paper_links(paper: str) -> str:
    """arXiv numbers as links; other sources as they are."""
    sources = [source.strip() for source in paper.split(",") if source.strip()]
    return ", ".join(f"https://arxiv.org/abs/{s}" if s.replace(".", "").isdigit() else s for s in sources)


def _row(parameter: Parameter) -> tuple[str, str, str, str]:
    return parameter.name, parameter.type, parameter.default, parameter.text
