"""Benchmarks by name: `python benchmarks/run.py speed [--quick]`; `... speed --help` for its options.

The judge is `python -m benchmarks.judge`; on a GPU: `python -m benchmarks.gpu.check` and `benchmarks.gpu.e2e`.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

# This folder's own packages (`models`, `gpu`) are not to hide others of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console  # noqa: E402

TASKS = {
    "speed": "benchmarks.speed.main",
    "recall": "benchmarks.speed.recall",
    "recalled": "benchmarks.fidelity.recalled",
    "capacity": "benchmarks.capacity.main",
    "soak": "benchmarks.capacity.soak",
    "fidelity": "benchmarks.fidelity.main",
    "policies": "benchmarks.fidelity.policies",
    "questions": "benchmarks.sharing.questions",
    "identity": "benchmarks.sharing.identity",
}
"""Modules by name of the task, each with `add_arguments(parser)` and `main(arguments, console)`; 0 is success."""


def main() -> int:
    """Run one task; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the task")
    asked = parser.parse_args()
    task = import_module(TASKS[asked.task])
    parser = argparse.ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} {asked.task}",
        description=task.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    task.add_arguments(parser)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        return int(task.main(parser.parse_args(asked.options), console))
    except KeyboardInterrupt:
        console.print("interrupted; the servers are stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
