"""What compression costs in right answers, on the bundled models: the experiments of docs/fidelity.md.

Each experiment is one or more calls of `vlcache eval` with the same output folder, so an interrupted run goes on where
it stopped.  A finished experiment becomes `benchmarks/results/fidelity-NAME.json`, and the page's tables and plots are
made from these files alone:

    python benchmarks/fidelity.py                      # everything that is missing, then the page
    python benchmarks/fidelity.py requery --time-limit 8
    python benchmarks/fidelity.py --page               # only the page
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from host import ROOT, host_block
from rich.console import Console

from vlcache_sgl.cli import eval as evaluation
from vlcache_sgl.cli.server import BUNDLED_FLAGS, ServerProcess, interruptible
from vlcache_sgl.policy import registry
from vlcache_sgl.policy.describe import describe

OUT = ROOT / "out/fidelity"
RESULTS = ROOT / "benchmarks/results"
GROUNDED, UNGROUNDED = "models/tinyvlm/grounded", "models/tinyvlm/ungrounded"
QUERY_AWARE = ("vlcache", "snapkv")
AGNOSTIC = ("keydiff", "expected_attention", "infinipot_v", "compactor", "knorm", "random")
BUDGETS = ("0.4", "0.2", "0.1")
SCORERS = {"accumulated": "h2o", "window": "snapkv", "post-vision": "vlcache", "random": "random"}
ALLOCATORS = {"uniform": "uniform", "pyramid": "pyramid", "density": "vlcache", "equal mass": "prefixkv"}
THRESHOLDS = ("0.001", "0.1")
ROWS = ("1", "4", "16")
ALONE = "recent=0.1,floor=0.5"
"""Selection of every cell of the ablation: that of the recipe `vlcache`."""


class Experiment(NamedTuple):
    """Calls of `vlcache eval` that fill one folder."""

    model: str
    calls: tuple[tuple[str, ...], ...]


def composed(scorer: str, allocator: str) -> str:
    """A cell of the ablation, as a value of `kv_policy`."""
    return f"scorer={SCORERS[scorer]},allocator={ALLOCATORS[allocator]},{ALONE}"


def recipes() -> list[str]:
    """All built-in recipes."""
    own = (item for item in describe(registry()) if item.kind == "policy" and item.provider.split()[0] == "vlcache-sgl")
    return [item.name for item in own]


def experiments() -> dict[str, Experiment]:
    """By name, in the order of the page."""
    ablation = [composed(scorer, allocator) for scorer in SCORERS for allocator in ALLOCATORS]
    sensitivity = [
        *(f"vlcache:threshold={value}" for value in THRESHOLDS),
        *(f"vlcache:scorer.rows={value},allocator.rows={value}" for value in ROWS),
    ]
    requery = ("--task", "requery", "--samples", "20", "--budget", *BUDGETS)
    return {
        "requery": Experiment(
            GROUNDED,
            (
                (*requery, "--policy", *QUERY_AWARE, *AGNOSTIC),
                (*requery, "--policy", *QUERY_AWARE, "keydiff", "--sharing", "private"),
            ),
        ),
        "recipes": Experiment(
            GROUNDED,
            (("--task", "single", "--samples", "30", "--policy", *recipes(), "--budget", "0.4", "0.2", "0.1", "0.05"),),
        ),
        "ablation": Experiment(
            GROUNDED,
            (
                ("--task", "single", "--samples", "40", "--policy", *ablation, "--budget", "0.1", "0.05"),
                ("--task", "single", "--samples", "40", "--policy", *sensitivity, "--budget", "0.1", "0.05"),
            ),
        ),
        "long": Experiment(
            GROUNDED,
            (
                (
                    "--task",
                    "long",
                    "--samples",
                    "20",
                    "--policy",
                    "vlcache",
                    "snapkv",
                    "h2o",
                    "keydiff",
                    "--budget",
                    *BUDGETS,
                ),
            ),
        ),
        "adversarial": Experiment(
            UNGROUNDED,
            (
                (
                    "--task",
                    "single",
                    "--samples",
                    "20",
                    "--policy",
                    "vlcache",
                    "snapkv",
                    "keydiff",
                    "--budget",
                    *BUDGETS,
                ),
                (*requery, "--policy", "vlcache", "keydiff"),
            ),
        ),
    }


def result_path(name: str) -> Path:
    """Where a finished experiment is committed."""
    return RESULTS / f"fidelity-{name}.json"


def run(name: str, experiment: Experiment, time_limit: float | None, console: Console) -> bool:
    """Ask what is missing; whether everything has been asked."""
    folder = OUT / name
    started, deadline = host_block(), None if time_limit is None else time.monotonic() + 60 * time_limit
    flags = [*BUNDLED_FLAGS, *evaluation.FLAGS]
    console.rule(name)
    with ServerProcess(experiment.model, flags, title=name, console=console) as server:
        for call in experiment.calls:
            argv = [*call, "--base-url", server.url, "--output", str(folder)]
            if deadline is not None:
                argv += ["--time-limit", str(max(0.01, (deadline - time.monotonic()) / 60))]
            code = evaluation.main(argv)
            if code:
                console.print(f"{name}: not finished, exit code {code}", style="red" if code != 3 else "")
                return False
    result = json.loads((folder / evaluation.RESULT).read_text())
    command = f"python benchmarks/fidelity.py {name}"
    calls = [" ".join(("vlcache eval", *call)) for call in experiment.calls]
    head = {"task": "fidelity", "command": command, "calls": calls, "server_flags": flags, "host": started}
    result_path(name).write_text(evaluation.dump({**head, **result}))
    console.print(f"written: {result_path(name).relative_to(ROOT)}")
    return True


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run what is missing, then write the page; 3 when something is not finished."""
    os.chdir(ROOT)  # the model's path is part of the results
    chosen = arguments.names or list(experiments())
    unfinished = []
    if not arguments.page:
        with interruptible():
            for name in chosen:
                if result_path(name).exists() and not arguments.names:
                    continue
                if not run(name, experiments()[name], arguments.time_limit, console):
                    unfinished.append(name)
    return 3 if unfinished else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of: {', '.join(experiments())}; default: what is missing"
    )
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="of each experiment; run again to go on")
    parser.add_argument("--page", action="store_true", help="ask nothing, write tables and plots again")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    raise SystemExit(main(parser.parse_args(), Console() if sys.stdout.isatty() else Console(width=140)))
