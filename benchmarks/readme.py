"""Writes the figures of README.md's first screen from the newest speed result.

`python benchmarks/readme.py` rewrites the block between the markers; `--check` only says whether it is current.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- results:begin (written by benchmarks/readme.py from benchmarks/results) -->"
END = "<!-- results:end -->"


def speed_result() -> dict[str, Any]:
    """The committed result of `make bench`."""
    paths = sorted((ROOT / "benchmarks/results").glob("*-speed-sglang*.json"))
    if not paths:
        raise FileNotFoundError("no speed result in benchmarks/results: run `make bench`")
    result: dict[str, Any] = json.loads(paths[-1].read_text())
    return result


def block(result: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    rows = {(r["server"], r["tokens"], r["batch"]): r for r in result["summary"]}
    points = sorted({(tokens, batch) for _, tokens, batch in rows})
    host = result["host"]
    samples = max(row["samples"] for row in rows.values())
    columns = ("prompt tokens x requests", "decode, budget 1.0", "decode, budget 0.1", "prefill, budget 0.1")
    lines = [f"| {' | '.join(columns)} | KV bytes, budget 0.1 |", "|---" * (len(columns) + 1) + "|"]
    for tokens, batch in points:
        full, tenth = rows.get(("ours 1.0", tokens, batch)), rows["ours 0.1", tokens, batch]
        cells = (
            f"{tokens} x {batch}",
            f"{full['decode_tokens_per_s_ratio']:.2f}x" if full else "-",
            f"**{tenth['decode_tokens_per_s_ratio']:.2f}x**",
            f"{tenth['prefill_ms_ratio']:.2f}x",
            f"{tenth['kv_bytes_per_request_ratio']:.3f}x",
        )
        lines.append(f"| {' | '.join(cells)} |")
    sglang, cores, command = host["packages"]["sglang"], host["cores"], result["command"]
    lines += [
        "",
        f"Ratios to stock SGLang {sglang} in the same run, medians of {samples}; random-weight Qwen2.5-VL, 12 layers,",
        f"float32, {cores} CPU cores, `{command}`. CPU figures: for GPUs see [docs/gpu.md](docs/gpu.md).",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if README.md is not current; write nothing")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{block(speed_result())}\n{END}{after}"
    if arguments.check:
        return int(wanted != text)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
