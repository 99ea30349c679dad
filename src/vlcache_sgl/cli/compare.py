"""`vlcache compare A B`: by how much two evaluations differ, whether that may be chance, and which answers flipped.

A and B are results of `vlcache eval` with the name of a condition: `out/eval#full` or `result.json#vlcache@0.1`.  B
alone may be a condition, of A's file: `vlcache compare out/eval#full vlcache@0.1`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlcache_sgl.cli.console import table_console
from vlcache_sgl.cli.eval import RESULT
from vlcache_sgl.evaluation.compare import Comparison, compare, select
from vlcache_sgl.evaluation.run import FULL, EvalError, Record

MAX_FLIPS = 20
_WIDTH = 120


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; returns the exit code, 1 when B is worse beyond chance."""
    arguments = _parser().parse_args(argv)
    console = table_console(_WIDTH)
    try:
        a, b = read(arguments.a, arguments.b)
        if arguments.task:
            a, b = ([record for record in records if record["task"] == arguments.task] for records in (a, b))
        result = compare(a, b)
    except (EvalError, OSError, ValueError, KeyError) as error:
        console.print(f"vlcache compare: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    if arguments.json:
        print(json.dumps({"a": arguments.a, "b": arguments.b, **asdict(result), "verdict": result.verdict}, indent=1))
    else:
        show(result, arguments, console)
    return 1 if result.interval[1] < 0 else 0


def read(a: str, b: str) -> tuple[list[Record], list[Record]]:
    """The records of A and B.

    Raises:
        EvalError: for an unknown condition.
        OSError: for a file that cannot be read.
    """
    path, _, condition = a.partition("#")
    other_path, mark, other_condition = b.partition("#")
    ours = _load(path)
    if not mark and not Path(b).exists():
        other_path, other_condition = path, b  # a condition of A's file
    theirs = ours if other_path == path else _load(other_path)
    return select(ours, condition or FULL), select(theirs, other_condition or FULL)


def _load(name: str) -> dict[str, Any]:
    path = Path(name)
    loaded: dict[str, Any] = json.loads((path / RESULT if path.is_dir() else path).read_text())
    return loaded


def show(result: Comparison, arguments: argparse.Namespace, console: Console) -> None:
    """For people."""
    low, high = result.interval
    console.print(f"A {arguments.a}: {result.score_a:.3f}", markup=False)
    console.print(f"B {arguments.b}: {result.score_b:.3f}", markup=False)
    console.print(
        f"B - A: {result.difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f} "
        f"({result.questions} questions, {result.samples} samples): {result.verdict}"
    )
    lost = sum(flip.lost for flip in result.flips)
    console.print(
        f"{result.same_answers:.0%} of the answers are the same; {lost} right ones became wrong, "
        f"{len(result.flips) - lost} wrong ones right"
    )
    if not result.flips:
        return
    table = Table(title="Flipped", title_justify="left")
    for name in ("sample", "question", "A", "B"):
        table.add_column(name, overflow="fold")
    for flip in result.flips[: arguments.flips]:
        mine, other = ("[green]", "[red]") if flip.lost else ("[red]", "[green]")
        table.add_row(flip.sample, str(flip.index), mine + escape(flip.before), other + escape(flip.after))
    console.print(table)
    if len(result.flips) > arguments.flips:
        console.print(f"and {len(result.flips) - arguments.flips} more: --flips")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlcache compare", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("a", metavar="A", help="FILE_OR_FOLDER[#CONDITION]; default condition: full")
    parser.add_argument("b", metavar="B", help="the same, or a condition of A's file")
    parser.add_argument("--task", help="only samples of this task")
    parser.add_argument("--flips", type=int, default=MAX_FLIPS, help=f"how many to list; default: {MAX_FLIPS}")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
