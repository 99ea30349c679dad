"""`vlcache eval`: what compression costs in right answers, for a model, images, texts and questions of one's own.

Asks a real server every question at the full cache and under every policy and budget, and writes every answer down at
once: a run that was interrupted goes on where it stopped when it is started again with the same --output.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vlcache_sgl._version import __version__
from vlcache_sgl.cli.console import table_console
from vlcache_sgl.client.client import Client
from vlcache_sgl.client.server import RunningServer, ServerError, interruptible
from vlcache_sgl.client.target import add_target_arguments, target
from vlcache_sgl.config import Flag, fraction
from vlcache_sgl.evaluation.data import TASKS, DataError, Sample, load_jsonl
from vlcache_sgl.evaluation.forced import Forcing
from vlcache_sgl.evaluation.report import (
    Row,
    cached_in_words,
    logprob_in_words,
    markdown,
    paired,
    percent,
    plot_budgets,
    summarise,
)
from vlcache_sgl.evaluation.run import FULL, Answers, Condition, EvalError, Record, Sharing, ask, ask_all, missing
from vlcache_sgl.evaluation.search import Verdict, judge, least_loss, least_samples

RESULT, TABLE, PLOT = "result.json", "table.md", "accuracy.png"
SAMPLES = 20
AT_ONCE = 4
FLAGS = ("--kv-policy", "vlcache", "--kv-budget", "0.1")
"""Flags of a server that is started here; each request names its own policy and budget."""
ALL = "--kv-scope all"
"""What a server needs for prompts without images."""
BUDGET_DEFAULT, DEFAULT_LOSS = "0.1", "0.02"
LADDER = ("0.7", "0.5", "0.4", "0.3", "0.2", "0.1", "0.05")
"""Budgets that `--auto` tries."""
IN_WORDS = {"within": "within", "lost": "too much", "unclear": "too few samples to tell"}
LOSS = Flag("--loss", fraction(below_one=True), "Loss of score against the full cache")
BUDGET = Flag("--budget", fraction(), "Share of the prompt to keep")
_WIDTH = 150


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; returns the exit code, 3 when it is not finished."""
    arguments = _parser().parse_args(argv)
    console = table_console(_WIDTH)
    try:
        conditions = [] if arguments.auto else conditions_of(arguments)
        samples = samples_of(arguments)
        if arguments.auto:
            check_search(arguments, samples)
        flags = (*FLAGS, *ALL.split()) if any(sample.text_only for sample in samples) else FLAGS
        with interruptible(), target(arguments, flags, console) as server:
            evaluation = Evaluation.begin(server, samples, arguments, console)
            if arguments.auto:
                return search(evaluation)
            finished = evaluation.ask(conditions)
            evaluation.report(conditions)
            return 0 if finished else 3
    except (DataError, EvalError, ServerError, ValueError) as error:
        console.print(f"vlcache eval: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on from {arguments.output}")
        return 130


@dataclass(frozen=True)
class Evaluation:
    """A server, what is asked of it, and the folder of the answers."""

    server: RunningServer
    samples: Sequence[Sample]
    arguments: argparse.Namespace
    console: Console
    info: Mapping[str, Any]
    """What the server says of itself."""
    answers: Answers

    @classmethod
    def begin(
        cls, server: RunningServer, samples: Sequence[Sample], arguments: argparse.Namespace, console: Console
    ) -> Self:
        """Open the folder.

        Raises:
            EvalError: when it holds answers of another model, or the server compresses none of the prompts.
        """
        info = server.server_info()
        text_only = [sample.id for sample in samples if sample.text_only]
        if text_only and info["internal_states"][0]["kv_policy"]["scope"] == "vision":
            raise EvalError(f"{text_only[0]} has no image, and this server compresses no text: start it with {ALL}")
        return cls(server, samples, arguments, console, info, Answers(arguments.output, model_name(info)))

    def missing(self, conditions: Sequence[Condition]) -> list[tuple[Sample, Condition]]:
        """What has not been asked yet."""
        return missing(self.samples, conditions, self.answers.done(self.arguments.logprob))

    def ask(self, conditions: Sequence[Condition]) -> bool:
        """Ask what is missing; whether nothing is left."""
        work = self.missing(conditions)
        if not work:
            self.console.print(f"{self.arguments.output}: everything has been asked already")
            return True
        client = Client(self.server.openai_url)
        total = sum(len(sample.questions) for sample, _ in work)
        say_cost(client, work, total, self.arguments, self.console)
        limit_s = 60 * self.arguments.time_limit if self.arguments.time_limit else None
        with progress_bar(self.console) as progress:
            bar = progress.add_task("asking", total=total)
            for _ in ask_all(
                client,
                work,
                self.answers,
                at_once=self.arguments.at_once,
                time_limit_s=limit_s,
                on_answer=lambda: progress.advance(bar),
                forcing=Forcing(self.server.url) if self.arguments.logprob else None,
            ):
                pass
        left = len(self.missing(conditions))
        if left:
            of = len(self.samples) * len(conditions)
            self.console.print(f"{left} of {of} are not done; the same command goes on")
        return not left

    def report(self, conditions: Sequence[Condition]) -> None:
        """Write and show the results."""
        records, folder = self.answers.records, self.arguments.output
        compared = paired(records, [condition.name for condition in conditions])
        head = {"model": model_name(self.info), "server": server_block(self.info)}
        self.console.print(terminal_table(write_results(folder, records, compared, head)))
        if aside := len(records) - sum("twin" not in record for record in compared):
            self.console.print(f"{aside} answers are not in the table: other conditions lack them")
        self.console.print(f"written: {folder / RESULT}, {TABLE}, {PLOT}")


def model_name(info: Mapping[str, Any]) -> str:
    return str(info.get("served_model_name") or info["model_path"])


def check_search(arguments: argparse.Namespace, samples: Sequence[Sample]) -> None:
    """
    Raises:
        ValueError: when what `--auto` asks for cannot be found, whatever the answers are.
    """
    LOSS.read(arguments.loss)
    for budget in arguments.budget or ():
        BUDGET.read(budget)
    if len(arguments.policy) != 1 or arguments.sharing == "both" or arguments.no_full:
        raise ValueError("--auto takes one --policy, one kind of --sharing, and the full cache")
    if least_loss(len(samples)) > float(arguments.loss):
        raise ValueError(
            f"{len(samples)} samples cannot show a loss of at most {arguments.loss}, even if no answer changes: "
            f"give at least {least_samples(float(arguments.loss))}, or --loss {least_loss(len(samples)) + 0.0005:.3f}"
        )


def search(evaluation: Evaluation) -> int:
    """Find the smallest budget within the loss, asking no more than that takes; 0 when there is one, 1 when none is
    shown to be, 3 when the time was over before."""
    arguments, console = evaluation.arguments, evaluation.console
    allowed = float(arguments.loss)
    full = Condition(None, "1.0")
    tried = [full]
    verdicts: list[tuple[Condition, Verdict]] = []
    for budget in sorted(arguments.budget or LADDER, key=float, reverse=True):
        condition = Condition(arguments.policy[0], budget, arguments.sharing)
        tried.append(condition)
        if not evaluation.ask([full, condition]):
            return 3
        before, after = (evaluation.answers.of(one, evaluation.samples) for one in (full, condition))
        verdict = judge(before, after, allowed)
        verdicts.append((condition, verdict))
        low, high = verdict.interval
        console.print(f"budget {budget}: loses {verdict.loss:.3f} ({low:.3f} to {high:.3f}), {IN_WORDS[verdict.kind]}")
        if verdict.kind != "within":
            break
    evaluation.report(tried)
    kept = [condition for condition, verdict in verdicts if verdict.kind == "within"]
    about = f"of {verdicts[0][1].questions} questions about {verdicts[0][1].samples} samples"
    if not kept:
        console.print(f"no budget tried is shown to lose at most {allowed:g} {about}")
        return 1
    console.print(f"the smallest budget that is shown to lose at most {allowed:g} {about}:")
    scope = f" {ALL}" if any(sample.text_only for sample in evaluation.samples) else ""
    flags = f"--kv-policy {kept[-1].policy} --kv-budget {kept[-1].budget}{scope}"
    console.print(flags, soft_wrap=True, markup=False, highlight=False)
    return 0


def say_cost(
    client: Client,
    work: Sequence[tuple[Sample, Condition]],
    total: int,
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    """What is ahead, from one question that is asked twice: the first time warms up."""
    first = next((pair for pair in work if pair[1].policy is not None), work[0])
    probe = Sample("probe", "probe", first[0].questions[:1], first[0].open_images)
    ask(client, probe, first[1])
    started = time.perf_counter()
    asked = ask(client, probe, first[1])["questions"][0]
    # An answer that is forced costs a prompt and what it costs to find it again.
    seconds = (time.perf_counter() - started) * (2 if arguments.logprob else 1)
    # What is left after the first question about an image is shared; how much that saves is not known before.
    prefills = sum(1 if condition.sharing == "shared" else len(sample.questions) for sample, condition in work)
    console.print(
        f"{total} questions, {prefills} of them with an image or a text to prefill, {arguments.at_once} at once. "
        f"One takes {seconds:.1f} s and has {asked['prompt_tokens']} tokens: at most about {minutes(total * seconds)}."
    )


def minutes(seconds: float) -> str:
    """A duration for people."""
    return f"{math.ceil(seconds / 60)} min" if seconds > 90 else f"{seconds:.0f} s"


def server_block(info: Mapping[str, Any]) -> dict[str, Any]:
    """What of the server's settings bears on answers."""
    state = info["internal_states"][0]["kv_policy"]
    names = ("dtype", "attention_backend", "chunked_prefill_size", "max_total_tokens", "tp_size", "version")
    return {
        **{name: info.get(name) for name in names},
        "vlcache": state["version"],
        **{name: state[name] for name in ("scope", "min_tokens", "cells_per_token", "bytes_per_cell")},
    }


def write_results(
    folder: Path, records: Sequence[Record], compared: Sequence[Record], head: dict[str, Any]
) -> list[Row]:
    """Result with all `records` of the folder, table and plot of what is `compared`; the rows of the summary."""
    rows = summarise(compared)
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
    forced = any("answer_logprob" in row for row in rows)
    table = Table(title="Score, with the full cache's answers for comparison", title_justify="left")
    for name in ("task", "condition"):
        table.add_column(name, no_wrap=True)
    for name in ("questions", "score", "95 % interval", "as full", "kept", "from cache"):
        table.add_column(name, justify="right", no_wrap=True)
    if forced:
        table.add_column("log p of right answer", justify="right")
    table.add_column("failed", justify="right", no_wrap=True)
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
            cached_in_words(row),
            *([logprob_in_words(row)] if forced else []),
            str(row["failed"] or ""),
            end_section=i + 1 < len(rows) and rows[i + 1]["task"] != row["task"],
        )
    return table


def conditions_of(arguments: argparse.Namespace) -> list[Condition]:
    """The full cache, then every policy at every budget and with every kind of sharing."""
    found = [] if arguments.no_full else [Condition(None, "1.0")]
    for policy in arguments.policy:
        for budget in arguments.budget or [BUDGET_DEFAULT]:
            BUDGET.read(budget)
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
    how.add_argument(
        "--budget",
        nargs="+",
        help=f"shares of the prompt to keep; default: {BUDGET_DEFAULT}; with --auto: {' '.join(LADDER)}",
    )
    how.add_argument(
        "--sharing",
        choices=("shared", "private", "both"),
        default="shared",
        help="whether later questions about an image find its compressed copy, or compress it again; default: shared",
    )
    how.add_argument("--no-full", action="store_true", help="leave out the full cache")
    how.add_argument(
        "--auto",
        action="store_true",
        help="find the smallest budget, from the largest down, whose loss of score is shown to be at most --loss",
    )
    how.add_argument(
        "--loss",
        default=DEFAULT_LOSS,
        metavar="SHARE",
        help=f"with --auto: what may be lost against the full cache, in points of the score; default: {DEFAULT_LOSS}",
    )
    how.add_argument(
        "--logprob",
        action="store_true",
        help="also measure how probable the right answer is, whatever is said: each prompt is computed twice for that",
    )
    add_target_arguments(parser)
    run = parser.add_argument_group("the run")
    run.add_argument("--output", type=Path, default=Path("out/eval"), help="folder of the results; default: out/eval")
    run.add_argument("--at-once", type=int, default=AT_ONCE, help=f"samples in flight; default: {AT_ONCE}")
    run.add_argument("--time-limit", type=float, metavar="MINUTES", help="begin nothing after that")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
