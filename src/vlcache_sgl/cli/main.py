"""The `vlcache` command: a table of subcommands, each a module with a `main(argv)` that is imported when asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vlcache_sgl._version import __version__
from vlcache_sgl.spelling import did_you_mean


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    module: str
    """Has ``main(argv: Sequence[str] | None) -> int``; its parser calls itself ``vlcache NAME``."""
    summary: str


COMMANDS = {
    "calibrate": Command("vlcache_sgl.cli.calibrate", "measure what each layer and KV head of a model needs"),
    "compare": Command("vlcache_sgl.cli.compare", "by how much two results of `vlcache eval` differ"),
    "demo": Command("vlcache_sgl.cli.demo", "ask a real server about images, compressed and in full"),
    "eval": Command("vlcache_sgl.cli.eval", "count right answers under many policies and budgets"),
    "inspect": Command("vlcache_sgl.cli.inspect", "show which patches of an image each layer keeps"),
    "plan": Command("vlcache_sgl.cli.plan", "how many requests and images fit into a GPU"),
    "policies": Command("vlcache_sgl.cli.policies", "list the installed policies, or explain one"),
    "top": Command("vlcache_sgl.cli.top", "watch a running server"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    listed = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="vlcache",
        description="KV-cache compression for vision-language models in SGLang.",
        epilog=f"commands:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vlcache-sgl {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see `vlcache COMMAND --help`")
    given = parser.parse_args(argv)
    if given.command not in COMMANDS:
        wrong = "no command" if given.command is None else f"unknown command {given.command!r}"
        meant = did_you_mean(given.command or "", COMMANDS)
        print(f"vlcache: {wrong}{meant}; choose one of: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    run = importlib.import_module(COMMANDS[given.command].module).main
    return int(run(given.arguments) or 0)


if __name__ == "__main__":
    sys.exit(main())
