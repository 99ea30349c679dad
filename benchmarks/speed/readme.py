"""Writes the figures of README.md's first screen from the newest speed result.

`python -m benchmarks.speed.readme` rewrites the block between the markers; `--check` only says whether it is current.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.host import ROOT
from benchmarks.common.pages import with_block
from benchmarks.common.results import RESULTS

PAGE = ROOT / "README.md"
MARKERS = "speed"
MIN_REPEATS = 5
"""Interleaved samples of each server and point, without which a ratio is not shown: a single one is an anecdote."""
COMMAND = f"python benchmarks/run.py speed --repeats {MIN_REPEATS}"


class TooFewRepeats(ValueError):
    """A result whose ratios cannot be given with a spread."""


def speed_result(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The newest committed result of `make bench` with enough repeats; None if there is none."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*-speed-sglang*.json"))]
    return next((result for result in reversed(results) if repeats(result) >= MIN_REPEATS), None)


def repeats(result: dict[str, Any]) -> int:
    """Samples that every ratio of a result rests on, at least."""
    return min((int(row["samples"]) for row in result["summary"]), default=0)


def block(result: dict[str, Any] | None) -> str:
    """The Markdown between the markers.

    Raises:
        TooFewRepeats: the result has fewer than `MIN_REPEATS`.
    """
    if result is None:
        return (
            f"No table of speed yet: it needs {MIN_REPEATS} interleaved repeats, to be shown with their spread, "
            f"and no\nsuch run is committed. To make one: `{COMMAND}`."
        )
    if repeats(result) < MIN_REPEATS:
        raise TooFewRepeats(f"this result has {repeats(result)} repeats, the table needs {MIN_REPEATS}: {COMMAND}")
    rows = {(r["server"], r["tokens"], r["batch"]): r for r in result["summary"]}
    points = sorted({(tokens, batch) for _, tokens, batch in rows})
    host = result["host"]
    columns = ("prompt tokens x requests", "decode, budget 1.0", "decode, budget 0.1", "prefill, budget 0.1")
    lines = [f"| {' | '.join(columns)} | KV bytes, budget 0.1 |", "|---" * (len(columns) + 1) + "|"]
    for tokens, batch in points:
        full, tenth = rows.get(("ours 1.0", tokens, batch)), rows["ours 0.1", tokens, batch]
        cells = (
            f"{tokens} x {batch}",
            ratio(full, "decode_tokens_per_s") if full else "-",
            ratio(tenth, "decode_tokens_per_s"),
            ratio(tenth, "prefill_ms"),
            f"{tenth['kv_bytes_per_request_ratio']:.3f}x",
        )
        lines.append(f"| {' | '.join(cells)} |")
    sglang, cores, command = host["packages"]["sglang"], host["cores"], result["command"]
    lines += [
        "",
        f"Ratios to stock SGLang {sglang}, each formed within one of {repeats(result)} interleaved repeats: median",
        f"(smallest to largest). Random-weight Qwen2.5-VL, 12 layers, float32, {cores} CPU cores, `{command}`.",
    ]
    return "\n".join(lines)


def ratio(row: dict[str, Any], key: str) -> str:
    """Median and spread of a ratio to stock."""
    low, high = row[f"{key}_ratio_range"]
    return f"**{row[f'{key}_ratio']:.2f}x** ({low:.2f} to {high:.2f})"


def rendered(page: str) -> str:
    """`page` with the block between its markers made anew."""
    return with_block(page, MARKERS, block(speed_result()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if README.md is not current; write nothing")
    arguments = parser.parse_args()
    text = PAGE.read_text()
    wanted = rendered(text)
    if arguments.check:
        return int(wanted != text)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
