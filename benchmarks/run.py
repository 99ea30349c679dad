"""Benchmarks by name: `python benchmarks/run.py speed [--quick]`."""

from __future__ import annotations

import argparse
import sys

import capacity
import sharing
import soak
import speed
from rich.console import Console

TASKS = {"speed": speed, "capacity": capacity, "sharing": sharing, "soak": soak}


def main() -> int:
    """Run one task; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, module in TASKS.items():
        module.add_arguments(tasks.add_parser(name, help=(module.__doc__ or "").splitlines()[0]))
    arguments = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        return TASKS[arguments.task].main(arguments, console)
    except KeyboardInterrupt:
        console.print("interrupted; the servers are stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
