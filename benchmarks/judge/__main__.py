"""`python -m benchmarks.judge` from the root of the repository."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from . import main


def run() -> int:
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_arguments(parser)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        return main.main(parser.parse_args(), console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(run())
