"""`vlcache eval`: what compression costs in right answers, for a model, pictures and questions of one's own.

Asks a real server every question at the full cache and under every policy and budget, and writes every answer down at
once: a run that was interrupted goes on where it stopped when it is started again with the same --output.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vlcache_sgl._version import __version__
from vlcache_sgl.cli.client import Client
from vlcache_sgl.cli.console import table_console
from vlcache_sgl.cli.server import RunningServer, ServerError, interruptible
from vlcache_sgl.cli.target import add_target_arguments, target
from vlcache_sgl.fidelity.data import TASKS, DataError, Sample, load_jsonl
from vlcache_sgl.fidelity.report import Row, markdown, percent, plot_budgets, summarise
from vlcache_sgl.fidelity.run import FULL, Answers, Condition, EvalError, Record, Sharing, ask, ask_all, missing

RESULT, TABLE, PLOT = "result.json", "table.md", "accuracy.png"
SAMPLES = 20
AT_ONCE = 4
FLAGS = ("--kv-policy", "vlcache", "--kv-budget", "0.1")
"""Of a server that is started here; each request names its own policy and budget."""
_WIDTH = 150


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; returns the exit code, 3 when it is not finished."""
    arguments = _parser().parse_args(argv)
    console = table_console(_WIDTH)
    try:
        conditions = conditions_of(arguments)
        samples = samples_of(arguments)
        with interruptible(), target(arguments, FLAGS, console) as server:
            return evaluate(server, samples, conditions, arguments, console)
    except (DataError, EvalError, ServerError, ValueError) as error:
        console.print(f"vlcache eval: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on from {arguments.output}")
        return 130


def evaluate(
    server: RunningServer,
    samples: Sequence[Sample],
    conditions: Sequence[Condition],
    arguments: argparse.Namespace,
    console: Console,
) -> int:
    """Ask what is missing and write the results; 0 when everything has been asked, 3 otherwise."""
    info = server.server_info()
    model = str(info.get("served_model_name") or info["model_path"])
    answers = Answers(arguments.output, model)
    work = missing(samples, conditions, answers.done)
    client = Client(server.openai_url)
    if work:
        total = sum(len(sample.questions) for sample, _ in work)
        say_cost(client, work, total, arguments.at_once, console)
        limit_s = 60 * arguments.time_limit if arguments.time_limit else None
        with progress_bar(console) as progress:
            bar = progress.add_task("asking", total=total)
            for _ in ask_all(
                client,
                work,
                answers,
                at_once=arguments.at_once,
                time_limit_s=limit_s,
                on_answer=lambda: progress.advance(bar),
            ):
                pass
    else:
        console.print(f"{arguments.output}: everything has been asked already")
    rows = write_results(arguments.output, answers.records, {"model": model, "server": server_block(info)})
    console.print(terminal_table(rows))
    console.print(f"written: {arguments.output / RESULT}, {TABLE}, {PLOT}")
    left = missing(samples, conditions, answers.done)
    if left:
        console.print(f"{len(left)} of {len(samples) * len(conditions)} are not done; the same command goes on")
    return 3 if left else 0


def say_cost(
    client: Client, work: Sequence[tuple[Sample, Condition]], total: int, at_once: int, console: Console
) -> None:
    """What is ahead, from one question that is asked twice: the first time warms up."""
    first = next((pair for pair in work if pair[1].policy is not None), work[0])
    probe = Sample("probe", "probe", first[0].questions[:1], first[0].open_images)
    ask(client, probe, first[1])
    started = time.perf_counter()
    asked = ask(client, probe, first[1])["questions"][0]
    seconds = time.perf_counter() - started
    # What is left after the first question about a picture is shared; how much that saves is not known before.
    prefills = sum(1 if condition.sharing == "shared" else len(sample.questions) for sample, condition in work)
    console.print(
        f"{total} questions, {prefills} of them with a picture to prefill, {at_once} at once. "
        f"One takes {seconds:.1f} s and has {asked['prompt_tokens']} tokens: at most about {minutes(total * seconds)}."
    )


def minutes(seconds: float) -> str:
    """A duration for people."""
    return f"{math.ceil(seconds / 60)} min" if seconds > 90 else f"{seconds:.0f} s"


def server_block(info: dict[str, Any]) -> dict[str, Any]:
    """What of the server's settings bears on answers."""
    state = info["internal_states"][0]["kv_policy"]
    names = ("dtype", "attention_backend", "chunked_prefill_size", "max_total_tokens", "tp_size", "version")
    return {
        **{name: info.get(name) for name in names},
        "vlcache": state["version"],
        **{name: state[name] for name in ("scope", "min_tokens", "cells_per_token", "bytes_per_cell")},
    }


def write_results(folder: Path, records: Sequence[Record], head: dict[str, Any]) -> list[Row]:
    """Result, table and plot of all answers in the folder; the rows of the summary."""
    rows = summarise(records)
    path = folder / RESULT
    path.write_text(dump({"vlcache": __version__, **head, "summary": rows, "records": records}))
    (folder / TABLE).write_text(markdown(rows))
    if any(row["condition"] != FULL for row in rows):
        plot_budgets(rows, folder / PLOT)
    return rows


def dump(result: dict[str, Any]) -> str:
    """JSON with one record and one summary row per line: large, and yet its differences can be read."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def terminal_table(rows: Sequence[Row]) -> Table:
    """The summary for people."""
    table = Table(title="Score, with the full cache's answers for comparison", title_justify="left")
    for name in ("task", "condition"):
        table.add_column(name, no_wrap=True)
    for name in ("questions", "score", "95 % interval", "as full", "kept", "from cache", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        low, high = row["interval"]
        table.add_row(
            row["task"],
            row["condition"],
            str(row["questions"]),
            f"{row['score']:.3f}",
            f"{low:.2f} to {high:.2f}",
            percent(row["same"]),
            f"{row['ratio']:.3f}",
            percent(row["cached"]),
            str(row["failed"] or ""),
            end_section=i + 1 < len(rows) and rows[i + 1]["task"] != row["task"],
        )
    return table


def conditions_of(arguments: argparse.Namespace) -> list[Condition]:
    """The full cache, then every policy at every budget and with every kind of sharing."""
    found = [] if arguments.no_full else [Condition(None, "1.0")]
    for policy in arguments.policy:
        for budget in arguments.budget:
            if not 0 < float(budget) <= 1:
                raise ValueError(f"--budget {budget}: a share in (0, 1]")
            kinds: tuple[Sharing, ...] = get_args(Sharing) if arguments.sharing == "both" else (arguments.sharing,)
            found += [Condition(policy, budget, kind) for kind in kinds]
    return list(dict.fromkeys(found))


def samples_of(arguments: argparse.Namespace) -> list[Sample]:
    """Bundled tasks and the user's files."""
    tasks = arguments.task or ([] if arguments.data else ["single"])
    found = [TASKS[task](number) for task in tasks for number in range(arguments.samples or SAMPLES)]
    for path in arguments.data:
        found += load_jsonl(path, arguments.samples)
    return found


def progress_bar(console: Console) -> Progress:
    """Answers that are there, of all; gone when it is full."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlcache eval", description=(__doc__ or "").split("\n\n", 1)[1])
    data = parser.add_argument_group("what is asked")
    data.add_argument(
        "--task", nargs="+", choices=TASKS, default=[], help="bundled tasks; default without --data: single"
    )
    data.add_argument(
        "--data", nargs="+", type=Path, default=[], metavar="FILE", help="JSONL files, format: docs/fidelity.md"
    )
    data.add_argument("--samples", type=int, help=f"of each task (default {SAMPLES}) or file (default: all)")
    how = parser.add_argument_group("under which conditions")
    how.add_argument("--policy", nargs="+", default=["vlcache"], help="values of --kv-policy; default: vlcache")
    how.add_argument("--budget", nargs="+", default=["0.1"], help="shares of the prompt to keep; default: 0.1")
    how.add_argument(
        "--sharing",
        choices=("shared", "private", "both"),
        default="shared",
        help="whether later questions about a picture find its compressed copy, or compress it again; default: shared",
    )
    how.add_argument("--no-full", action="store_true", help="leave out the full cache")
    add_target_arguments(parser)
    run = parser.add_argument_group("the run")
    run.add_argument("--output", type=Path, default=Path("out/eval"), help="folder of the results; default: out/eval")
    run.add_argument("--at-once", type=int, default=AT_ONCE, help=f"samples in flight; default: {AT_ONCE}")
    run.add_argument("--time-limit", type=float, metavar="MINUTES", help="begin nothing after that")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
