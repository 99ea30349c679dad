"""What a real pretrained language model still answers under every policy and budget.

Each case is written down at once, so that an interrupted run goes on where it stopped.

    python -m benchmarks.judge                                         # all tasks and seeds, then the page
    python -m benchmarks.judge --seeds 100-119 --policies keydiff      # to out/ only
    python -m benchmarks.judge --page                                  # only the page
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlcache_sgl.evaluation.tasks.reading import FIRST_TEST_SEED, TASKS
from vlcache_sgl.policy import PolicyError, resolve
from vlcache_sgl.policy.policy import Policy
from vlcache_sgl.weights import ModelWeights, read_weights

from ..common.host import ROOT, host_block
from ..common.results import save
from . import page
from .cases import CaseId
from .conditions import BUDGETS, CONTENDERS, FULL, MEDIA, SHARED, VARIANTS, Condition, conditions, recipes
from .decisions import reads_twice
from .records import Found, Records, RecordsError, digest
from .summary import summarise
from .verdicts import Judge

MODEL = "out/smollm2/text"
WEIGHTS = ROOT / "models/smollm2/weights.json"
ANSWERS, QUICK = ROOT / "out/judge/verdicts.jsonl", ROOT / "out/judge/judge.json"
ASKED = ("needle:400", "list:250", "reworded:400", "sentence:400")
SEEDS = range(FIRST_TEST_SEED, FIRST_TEST_SEED + 50)
JUDGED = {False: "", True: " over the compressed prefix"}
"""How a policy's answers are judged, by whether it reads twice: part of what makes a recorded verdict count."""
OTHERS = 12
"""Seeds on which policies that are no contenders are judged: all of them on all would take a day."""


class ArgumentError(ValueError):
    """A value on the command line cannot be used; the message is one line."""


# -- in each process ---------------------------------------------------------------------------------------------------

_judges: list[Judge] = []
"""The judge of this process; a model is loaded once."""


def _begin(folder: Path, threads: int, weights: ModelWeights | None) -> None:
    torch.set_num_threads(threads)
    _judges[:] = [Judge(folder, weights)]


def _judge(case: CaseId, asked: Sequence[Condition]) -> Found:
    texts = {condition.policy for condition in asked if condition.policy != FULL}
    return _judges[0].verdicts(case, asked, {text: resolve(text) for text in texts})


# -- in the main process -----------------------------------------------------------------------------------------------


def read_task(text: str) -> tuple[str, int]:
    """Task and nominal tokens of ``needle:400``.

    Raises:
        ArgumentError: no such task, or no size.
    """
    task, _, tokens = text.partition(":")
    if task not in TASKS or not tokens.isdecimal():
        raise ArgumentError(f"--tasks takes TASK:TOKENS, got {text!r}; tasks: {', '.join(TASKS)}")
    return task, int(tokens)


def read_seeds(text: str) -> tuple[int, ...]:
    """The seeds of ``100-199``, both ends included, of ``100``, or of several of these with commas between them.

    Raises:
        ArgumentError: not one of these.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        one = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
        if not one:
            raise ArgumentError(f"--seeds takes FIRST-LAST, several with commas between them, got {text!r}")
        seeds += one
    return tuple(seeds)


def judge_all(
    records: Records,
    cases: Sequence[CaseId],
    asked: Sequence[Condition],
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    """Judge what is missing; if policies were not named, on later seeds only contenders, and no later questions."""
    few = read_seeds(arguments.seeds)[: arguments.others]
    contenders = [one for one in asked if one.policy in (FULL, *CONTENDERS) and one.turn == "first"]
    wanted = {case: asked if arguments.policies or case.seed in few else contenders for case in cases}
    waiting = [(case, missing) for case in cases if (missing := records.missing(case, wanted[case]))]
    if not waiting:
        return
    with _progress(console) as progress:
        bar = progress.add_task("cases", total=len(cases), completed=len(cases) - len(waiting))
        for item, found in _judged(waiting, arguments):
            records.add(*item, found)
            progress.advance(bar)


Item = tuple[CaseId, list[Condition]]


def _judged(waiting: Sequence[Item], arguments: argparse.Namespace) -> Iterator[tuple[Item, Found]]:
    """Verdicts as they come; with one job from this process, whose model is then the only one."""
    if arguments.jobs == 1:
        _begin(*_model(arguments))
        yield from ((item, _judge(*item)) for item in waiting)
        return
    context = get_context("spawn")  # torch's threads do not survive a fork
    begin = _model(arguments)
    with ProcessPoolExecutor(min(arguments.jobs, len(waiting)), context, initializer=_begin, initargs=begin) as pool:
        futures = {pool.submit(_judge, *item): item for item in waiting}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def _model(arguments: argparse.Namespace) -> tuple[Path, int, ModelWeights | None]:
    """What a process is begun with."""
    return arguments.model, arguments.threads, model_weights(arguments)


def model_weights(arguments: argparse.Namespace) -> ModelWeights | None:
    """
    Raises:
        ArgumentError: not readable, or those of another model.
    """
    if arguments.weights == "off":
        return None
    config = json.loads((arguments.model / "config.json").read_text())
    try:
        weights = read_weights(Path(arguments.weights))
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    try:
        weights.check(config["num_hidden_layers"], config["num_key_value_heads"])
    except ValueError as error:
        raise ArgumentError(f"{arguments.weights} {error}") from error
    return weights


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def result_of(
    records: Records, cases: Sequence[CaseId], asked: Sequence[Condition], arguments: Sequence[str], **head: Any
) -> dict[str, Any]:
    """What is committed; `arguments` are those of the command line."""
    found = {case: records.found[case] for case in cases}
    return {
        "task": "judge",
        "command": shlex.join(["python", "-m", "benchmarks.judge", *arguments]),
        **head,
        "summary": summarise(found, asked),
    }


def dump(result: Mapping[str, Any]) -> str:
    """JSON with one row of the summary per line: results are compared in diffs."""
    head = json.dumps({name: value for name, value in result.items() if name != "summary"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in result["summary"])
    return f'{head[:-2]},\n "summary": [\n  {rows}\n ]\n}}\n'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--model", type=Path, default=ROOT / MODEL, help=f"checkpoint folder; default {MODEL}")
    parser.add_argument("--tasks", nargs="+", metavar="TASK:TOKENS", default=ASKED)
    parser.add_argument("--seeds", metavar="FIRST-LAST", default=f"{SEEDS[0]}-{SEEDS[-1]}")
    parser.add_argument("--policies", nargs="+", metavar="POLICY", help="default: all recipes and some variants")
    parser.add_argument("--others", type=int, default=OTHERS, help="seeds for policies that are no contenders")
    parser.add_argument("--budgets", nargs="+", type=float, metavar="SHARE", default=BUDGETS)
    parser.add_argument("--media", nargs="+", choices=MEDIA, default=MEDIA)
    parser.add_argument(
        "--shared", nargs="*", metavar="POLICY", default=SHARED, help="ask their copies a later question"
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        default=str(WEIGHTS),
        help="what `vlcache calibrate` found of the model's layers and heads, or off",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes; default 2, one model each (1 GB)")
    parser.add_argument("--threads", type=int, default=1, help="of each process; default 1")
    parser.add_argument("--answers", type=Path, default=ANSWERS, help="file of verdicts to go on with")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/ for everything, out/ for less")
    parser.add_argument("--page", action="store_true", help="judge nothing, write tables and figure again")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Judge what is missing, write the result, and the page if the result is the committed one."""
    if arguments.page:
        result = page.committed()
        if result is None:
            console.print(f"there is no {page.RESULT.relative_to(ROOT)} yet", style="red")
            return 2
        page.write(result)
        return 0
    try:
        return _run(arguments, console)
    except (ArgumentError, RecordsError, PolicyError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2


def _run(arguments: argparse.Namespace, console: Console) -> int:
    weights = arguments.model / "model.safetensors"
    if not weights.exists():
        raise ArgumentError(f"there is no {weights}; `make real-model` builds the model")
    texts = arguments.policies or [*recipes(), *VARIANTS]
    policies: dict[str, Policy] = {text: resolve(text) for text in texts}
    asked = conditions(texts, arguments.budgets, arguments.media, arguments.shared)
    seeds = read_seeds(arguments.seeds)
    cases = [CaseId(*read_task(task), seed) for seed in seeds for task in arguments.tasks]
    started, checksum = host_block(), digest(arguments.model)
    known = model_weights(arguments)
    ending = "" if known is None else f"~{known.digest}"
    prints = {text: f"{policy.fingerprint}{ending}{JUDGED[reads_twice(policy)]}" for text, policy in policies.items()}
    records = Records(arguments.answers, checksum, prints)
    judge_all(records, cases, asked, arguments, console)
    model = arguments.model.absolute()  # where it was built may be a link
    where = {"model": str(model.relative_to(ROOT)) if model.is_relative_to(ROOT) else model.name, "weights": checksum}
    settings = {**where, "host": started, "seeds": arguments.seeds, "policies": prints}
    result = result_of(records, cases, asked, sys.argv[1:], **settings)
    whole = {"tasks": ASKED, "seeds": f"{SEEDS[0]}-{SEEDS[-1]}", "policies": None, "budgets": BUDGETS, "media": MEDIA}
    is_whole = all(getattr(arguments, name) == value for name, value in whole.items())
    output = arguments.output or (page.RESULT if is_whole else QUICK)
    save(output, result, dump(result))
    for medium, turn in _tables(asked):
        console.print(f"\n{medium}, {turn} question: right answers (interval), log-probability")
        console.print(page.policies_table(medium, turn)(result), soft_wrap=True, markup=False)
    console.print(f"written: {output.resolve()}", soft_wrap=True)
    if output.resolve() == page.RESULT:
        page.write(result)
    return 0


def _tables(asked: Sequence[Condition]) -> Iterator[tuple[str, str]]:
    """Media and turns of which there is a table."""
    yield from dict.fromkeys((condition.medium, condition.turn) for condition in asked if condition.policy != FULL)
