"""Write the tables of the model card from the results files: `python -m models.tinyvlm.card [--check]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.common.pages import with_blocks

from .checkpoint import HERE

CARD = HERE / "README.md"
NAMES = ("grounded", "ungrounded")
SCORER_ORDER = ("post-vision", "last token", "accumulated", "sliding window", "random")

Json = dict[str, Any]


def exact_match(results: dict[str, Json]) -> str:
    """Full cache, by grid."""
    rows = []
    for index, first in enumerate(results[NAMES[0]]["exact_match"]):
        cells = [_with_interval(results[name]["exact_match"][index]) for name in NAMES]
        grid_rows, grid_cols = first["grid"].split("x")
        rows.append([first["grid"], str(int(grid_rows) * int(grid_cols)), str(first["n"]), *cells])
    return _table(["grid", "image tokens", "n", *NAMES], rows)


def compressed(results: dict[str, Json]) -> str:
    """Answers equal to the full cache's, every policy and budget, for the grounded model."""
    return "\n\n".join(_compressed_table(entry) for entry in results["grounded"]["compressed"])


def adversarial(results: dict[str, Json]) -> str:
    """The same for the ungrounded model, one grid."""
    return "\n\n".join(_compressed_table(e) for e in results["ungrounded"]["compressed"] if e["grid"] == "24x24")


def hit_rates(results: dict[str, Json]) -> str:
    """Cache hit rate and attention mass per layer."""
    rows = []
    for name in NAMES:
        entry = next(e for e in results[name]["compressed"] if e["grid"] == "24x24")
        for scorer in SCORER_ORDER:
            for kind in ("tokens", "mass"):
                values = entry["hit_rate"][scorer][kind]
                rows.append([name, scorer, kind, *_numbers(values, 2), f"{sum(values) / len(values):.2f}"])
    layers = [f"layer {i}" for i in range(len(rows[0]) - 4)]
    return _table(["model", "scorer", "share of", *layers, "mean"], rows)


def densities(results: dict[str, Json]) -> str:
    """Density of the post-vision rows per layer."""
    rows = [
        [name, entry["grid"], *_numbers(entry["density"], 4)] for name in NAMES for entry in results[name]["compressed"]
    ]
    return _table(["model", "grid", *(f"layer {i}" for i in range(len(rows[0]) - 2))], rows)


TABLES: dict[str, Callable[[dict[str, Json]], str]] = {
    "exact-match": exact_match,
    "compressed": compressed,
    "adversarial": adversarial,
    "hit-rates": hit_rates,
    "densities": densities,
}


def rendered(card: str) -> str:
    """The card with every table between its markers made anew from the results files."""
    results = {name: json.loads((HERE / "results" / f"{name}.json").read_text()) for name in NAMES}
    return with_blocks(card, {name: f"\n{table(results)}\n" for name, table in TABLES.items()})


def _compressed_table(entry: Json) -> str:
    """One grid: a row per policy, text competing or protected, a column per budget."""
    budgets = sorted({row["budget"] for row in entry["policies"]})
    shares = {(row["policy"], row["protect_text"], row["budget"]): row["share"] for row in entry["policies"]}
    policies = list(dict.fromkeys((row["policy"], row["protect_text"]) for row in entry["policies"]))
    rows = [
        [policy, "protected" if protect else "competes", *_numbers((shares[policy, protect, b] for b in budgets), 2)]
        for policy, protect in policies
    ]
    caption = (
        f"{entry['grid']}, prompts of {entry['prompt_tokens']:.0f} tokens, n = {entry['full']['n']}; "
        f"all text and the record alone: {entry['record_and_text']['share']:.2f}, "
        f"all text and no image: {entry['text_only']['share']:.2f}."
    )
    return f"{caption}\n\n{_table(['policy', 'text', *(f'budget {b:g}' for b in budgets)], rows)}"


def _with_interval(row: Json) -> str:
    low, high = row["interval"]
    return f"{row['share']:.3f} ({low:.3f} to {high:.3f})"


def _numbers(values: Iterable[float], digits: int) -> list[str]:
    return [f"{value:.{digits}f}" for value in values]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the card is out of date")
    options = parser.parse_args(arguments)
    old = CARD.read_text()
    new = rendered(old)
    if options.check and new != old:
        raise SystemExit("the card's tables differ from the results files: run python -m models.tinyvlm.card")
    CARD.write_text(new)


if __name__ == "__main__":
    main()
