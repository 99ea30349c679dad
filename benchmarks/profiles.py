"""Layer profiles of the bundled models on held-out pictures: later questions about a shared picture.

The profiles are `models/tinyvlm/profiles/NAME.json`, made by the command they hold (`vlcache calibrate`, seeds from
50000).  Here twenty other pictures (the task `requery`) are asked eight questions each on a server whose policy reads
the file; a finished model becomes `benchmarks/results/profile-NAME.json`, and the table of docs/calibrate.md is made
from these files alone:

    python benchmarks/profiles.py [NAME ...]    # goes on where it stopped
    python benchmarks/profiles.py --page        # only the page
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fidelity import cell, without_first
from host import ROOT, host_block
from rich.console import Console

from vlcache_sgl.cli import eval as evaluation
from vlcache_sgl.cli.calibrate import policy_text
from vlcache_sgl.cli.server import BUNDLED_FLAGS, ServerProcess, interruptible
from vlcache_sgl.fidelity.report import markdown_table
from vlcache_sgl.fidelity.run import FULL

PAGE = ROOT / "docs/calibrate.md"
BEGIN = "<!-- results:begin (written by benchmarks/profiles.py from benchmarks/results) -->"
END = "<!-- results:end -->"
OUT = ROOT / "out/profiles"
MODELS = ("grounded", "ungrounded")
PICTURES = 20


def profile_path(name: str) -> Path:
    """Relative to the repository: the path is part of the result."""
    return Path("models/tinyvlm/profiles") / f"{name}.json"


def result_path(name: str) -> Path:
    """Where a finished model is committed."""
    return ROOT / f"benchmarks/results/profile-{name}.json"


def of_file(name: str) -> str:
    """The profile's policy where layers divide the budget, text included."""
    return f"scorer=keydiff,allocator=table,file={profile_path(name)},floor=0"


def conditions(name: str, profile: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Row of the table -> value of `kv_policy`, budget."""
    shares, share = tuple(profile["weights"]), f"{profile['share']:g}"
    # What the profile keeps beside all text; the budget of uniform layers with the same memory.
    kept = f"{profile['kept']:g}"
    return {
        "uniform": ("keydiff", share),
        "profile": (of_file(name), share),
        "uniform, text protected": ("keydiff:protect=text", kept),
        "profile beside the text": (policy_text("keydiff", shares), "0.999"),
    }


def run(name: str, console: Console) -> bool:
    """Ask what is missing; whether everything has been asked."""
    profile = json.loads(profile_path(name).read_text())
    folder, started = OUT / name, host_block()
    flags = [*BUNDLED_FLAGS, "--kv-policy", of_file(name), "--kv-budget", f"{profile['share']:g}"]
    with ServerProcess(f"models/tinyvlm/{name}", flags, title=name, console=console) as server:
        task = ("--task", "requery", "--samples", str(PICTURES), "--base-url", server.url, "--output", str(folder))
        for policy, budget in conditions(name, profile).values():
            if code := evaluation.main([*task, "--policy", policy, "--budget", budget]):
                console.print(f"{name}: not finished, exit code {code}", style="red")
                return False
    commit(name, profile, flags, started)
    console.print(f"written: {result_path(name).relative_to(ROOT)}")
    return True


def commit(name: str, profile: Mapping[str, Any], flags: Sequence[str], started: Mapping[str, Any]) -> None:
    """Write the result, with where it came from."""
    result = json.loads((OUT / name / evaluation.RESULT).read_text())
    head = {
        "task": "profile",
        "command": f"python benchmarks/profiles.py {name}",
        "profile": str(profile_path(name)),
        "weights": profile["weights"],
        "rows": {row: f"{policy}@{budget}" for row, (policy, budget) in conditions(name, profile).items()},
        "server_flags": list(flags),
        "host": started,
    }
    result_path(name).write_text(evaluation.dump({**head, **result}))


def block(name: str, result: Mapping[str, Any]) -> str:
    """A model's table."""
    summary = {row["condition"]: row for row in result["summary"]}
    lines = []
    for title, condition in {"full cache": FULL, **result["rows"]}.items():
        first = {r["sample"]: r["questions"][0]["score"] for r in result["records"] if r["condition"] == condition}
        later = cell(without_first(result["records"], condition))
        lines.append([title, f"{summary[condition]['ratio']:.3f}", f"{sum(first.values()) / len(first):.2f}", later])
    head = ("layer budgets", "cells kept", "question 1", "questions 2 to 8, shared")
    weights = " ".join(f"{share:g}" for share in result["weights"])
    host = result["host"]
    return (
        f"`{name}`, {len(first)} pictures of 576 tokens, profile {weights}:\n\n{markdown_table(head, lines)}\n\n"
        f"`{result['command']}`, {host['date'][:10]}, SGLang {host['packages']['sglang']}, {host['cores']} CPU cores, "
        f"float32. Policies that failed: {sum(row['failed'] for row in result['summary'])}."
    )


def committed() -> dict[str, dict[str, Any]]:
    """The results that there are, by model."""
    return {name: json.loads(result_path(name).read_text()) for name in MODELS if result_path(name).exists()}


def rendered(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """`page` with the part between its markers made anew."""
    before, _, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not closed:
        raise ValueError(f"{PAGE.name} lacks its markers")
    return f"{before}{BEGIN}\n" + "\n\n".join(block(*item) for item in results.items()) + f"\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the page; 3 when something is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(MODELS)}; default: what is missing")
    parser.add_argument("--page", action="store_true", help="ask nothing, write the tables again")
    arguments = parser.parse_args(argv)
    os.chdir(ROOT)  # the model's path is part of the results
    console = Console() if sys.stdout.isatty() else Console(width=140)
    finished = True
    if not arguments.page:
        with interruptible():
            for name in arguments.names or [name for name in MODELS if not result_path(name).exists()]:
                finished &= run(name, console)
    PAGE.write_text(rendered(PAGE.read_text(), committed()))
    return 0 if finished else 3


if __name__ == "__main__":
    sys.exit(main())
