"""Many questions about one picture: what sharing a compressed copy costs and saves, what the guard notices.

Each experiment becomes `benchmarks/results/sharing-NAME.json`; docs/sharing.md and its figures come from these alone:

* table: every way to share beside the full cache: right answers, first tokens, bytes, pictures computed anew.
* latency: first tokens, and what observing costs, on a model of random weights whose prefill costs something.
* guard: readings on a server beside wrong answers, and what observing costs.
* just-in-time: the same questions to a model that looks things up while it answers.
* copies: without a server, scores and budgets of a copy, readings beside wrong answers.
* late: the same readings of the model that looks things up while it answers.
* sketch: without a server, estimated against true missing attention, and what else was tried.

Every answer is written down at once, so that an interrupted run goes on where it stopped:

    python benchmarks/run.py sharing                    # what is missing, then the page
    python benchmarks/run.py sharing table --quick      # does it run?
    python benchmarks/run.py sharing --page             # only the page
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from rich.console import Console
from rich.progress import Progress

from benchmarks.common.host import ROOT, host_block
from benchmarks.common.load import PLACE, Prompt, Timeline, prefill_ms, stream
from benchmarks.common.results import RESULTS, save
from benchmarks.models.make_model import make_model
from benchmarks.sharing import copies, sketch
from benchmarks.sharing.copies import PROFILE, UNGROUNDED
from benchmarks.sharing.figures import draw_plots
from benchmarks.sharing.page import PAGE, rendered
from benchmarks.sharing.results import UNGUARDED, dump, summarise
from benchmarks.speed.main import MODEL_NAME
from vlcache_sgl.client.client import data_url
from vlcache_sgl.client.server import BUNDLED_FLAGS, ServerProcess, interruptible
from vlcache_sgl.config import KVConfig
from vlcache_sgl.evaluation.tasks.receipts import make_picture

GROUNDED = "models/tinyvlm/grounded"
RANDOM_WEIGHTS = "out/bench-model"
OUT = ROOT / "out/sharing"
QUESTIONS = 8
MOST_TOKENS = 8
"""Of an answer, which has four and the end of the turn."""
SIDE = 24
"""Pictures are 24 x 24 cells: 576 image tokens."""
TEST_SEED, CHOICE_SEED, JUDGEMENT_SEED = 60_000, 61_000, 62_000
WARM_UP_SEED = 999_000
FLAGS = (
    *(*BUNDLED_FLAGS, "--chunked-prefill-size", "2048", "--enable-metrics"),
    *("--kv-policy", "vlcache", "--kv-budget", "0.1"),
)
COUNTERS = (
    *("expansions", "guard_ms", "guard_decode_ms", "prefill_ms", "scoring_ms", "selection_ms", "policy_failures"),
)
"""Of the server, as growth per picture."""
STATE = ("cells_tree", "cells_per_token", "bytes_per_cell", "sketch_bytes", "pictures_whole")
"""Of the server, after a picture's last question."""
THRESHOLD = KVConfig("vlcache").guard_threshold
"""Of the guards: the server's own."""
OFFLINE = {"copies": copies.run, "late": copies.run_late, "sketch": sketch.run}
"""Experiments without a server."""


class Arm(NamedTuple):
    """One way to serve."""

    name: str
    flags: tuple[str, ...] = ()
    """Of its server, in addition to `FLAGS`; arms with the same ones share a server."""
    params: Mapping[str, str] = {}
    """`custom_params` of its requests."""


class Experiment(NamedTuple):
    """Arms that answer the same questions about the same pictures."""

    arms: tuple[Arm, ...]
    pictures: tuple[tuple[int, int], ...]
    """Seed and side."""
    model: str = GROUNDED
    again: bool = False
    """Ask the first question once more at the end."""
    together: int = 4
    """Servers alive at the same time; arms of servers that are not are not to be compared in time."""


FULL = Arm("full cache", (), {"kv_budget": "1.0"})
POLICY = Arm("policy", (), {"kv_share": "policy"})
PRIVATE = Arm("off", (), {"kv_share": "off"})
TIERED = Arm("tiered", (), {"kv_share": "tiered"})
WITH_PROFILE = ("--kv-profile", PROFILE)
ALONE = Arm(UNGUARDED, ("--kv-guard", "off"), {"kv_share": "tiered"})
"""What observing is compared with: processes differ, and other arms keep theirs busy."""


def guarded(mode: str, profile: bool = False) -> tuple[str, ...]:
    """Flags of a server with the guard on."""
    return (*(WITH_PROFILE if profile else ()), "--kv-guard", mode)


def varied(arm: Arm, what: str, *flags: str) -> Arm:
    """`arm` on another server."""
    return Arm(f"{arm.name}, {what}", flags, arm.params)


def experiments() -> dict[str, Experiment]:
    """By name, in the order in which they are run."""
    tested = tuple((TEST_SEED + i, SIDE) for i in range(20))
    return {
        "table": Experiment(
            (
                FULL,
                POLICY,
                PRIVATE,
                TIERED,
                varied(TIERED, "profile", *WITH_PROFILE),
                varied(POLICY, "enforce", *guarded("enforce")),
                varied(TIERED, "enforce", *guarded("enforce")),
                varied(TIERED, "profile, enforce", *guarded("enforce", profile=True)),
            ),
            tested,
        ),
        "latency": Experiment(
            (FULL, POLICY, PRIVATE, TIERED, ALONE, varied(TIERED, "observe", *guarded("observe"))),
            tuple((TEST_SEED + i, SIDE) for i in range(10)),
            model=RANDOM_WEIGHTS,
        ),
        "guard": Experiment(
            (
                FULL,
                POLICY,
                ALONE,
                varied(POLICY, "observe", *guarded("observe")),
                varied(TIERED, "observe", *guarded("observe")),
                varied(POLICY, "profile, observe", *guarded("observe", profile=True)),
                varied(TIERED, "profile, observe", *guarded("observe", profile=True)),
            ),
            tuple((seed + i, SIDE) for i in range(4) for seed in (CHOICE_SEED, JUDGEMENT_SEED)),
            again=True,
        ),
        "just-in-time": Experiment(
            (
                FULL,
                POLICY,
                PRIVATE,
                varied(POLICY, "enforce", *guarded("enforce")),
                varied(TIERED, "enforce", *guarded("enforce")),
            ),
            tested[:10],
            model=UNGROUNDED,
        ),
    }


# -- asking -----------------------------------------------------------------------------------------------------------


def ask(http: httpx.Client, server: ServerProcess, image: str, question: str, **params: str) -> Timeline:
    """One question with `custom_params`, streamed."""
    prompt = Prompt(f"<|im_start|>user\n{PLACE}{question}<|im_end|>\n<|im_start|>assistant\n", (image,))
    more = {"custom_params": params} if params else {}
    return stream(http, server.url, json.dumps(prompt.body(MOST_TOKENS, ignore_eos=False, **more)))


def report_of(line: Timeline) -> dict[str, Any]:
    """What the server did to the prompt."""
    found = line.meta.get("kv_compression")
    report: dict[str, Any] = (found[0] if isinstance(found, list) else found) or {}
    return report


def picture_kept(report: Mapping[str, Any]) -> float:
    """Share of a picture's cells that a request has found or left; all where compression had nothing to do."""
    if "kept_positions" not in report:
        return 1.0
    spans = [range(run["begin"], run["end"]) for run in report["vision"]]
    kept = sum(position in span for layer in report["kept_positions"] for position in layer for span in spans)
    return kept / (len(report["kept_positions"]) * sum(map(len, spans)))


@cache
def small_picture() -> str:
    """A URL of a picture that no experiment asks about."""
    return data_url(make_picture(WARM_UP_SEED, 8, 8).image)


def wake(http: httpx.Client, server: ServerProcess) -> None:
    """The first request after others have had the cores is slow: it is not one that is measured."""
    for _ in range(2):
        ask(http, server, small_picture(), "red V?")


def measure(http: httpx.Client, server: ServerProcess, arm: Arm, seed: int, side: int, again: bool) -> dict[str, Any]:
    """All questions about one picture, one at a time, from an empty prefix cache; and what they leave there."""
    picture = make_picture(seed, side, side, num_questions=QUESTIONS)
    image = data_url(picture.image)
    wake(http, server)
    server.flush_cache()
    before = server.kv_policy()
    answers = []
    for question in (*picture.questions, *picture.questions[:again]):
        line = ask(http, server, image, question.text, **arm.params)
        report = report_of(line)
        if "failed" in report:
            raise RuntimeError(f"{arm.name}, picture {seed}: {report['failed']}")
        answer: dict[str, Any] = {
            "answer": line.text.strip(),
            "right": line.text.strip() == question.answer,
            "ttft_ms": round(line.ttft_ms, 1),
            "prefill_ms": round(prefill_ms([line]), 2),
            "prompt_tokens": int(line.meta["prompt_tokens"]),
            "cached_tokens": int(line.meta["cached_tokens"]),
        }
        if "guard" in report:
            answer |= {key: value for key, value in report["guard"].items() if key != "threshold"}
        if "recomputed" in report:
            answer["recomputed"] = report["recomputed"]
        answers.append(answer)
    after = server.kv_policy()
    last = report_of(ask(http, server, image, picture.questions[-1].text, **arm.params, kv_report="positions"))
    if after["integrity"]:
        raise RuntimeError(f"{arm.name}, picture {seed}: {after['integrity']}")
    return {
        "arm": arm.name,
        "seed": seed,
        "side": side,
        "questions": answers,
        **{key: after[key] for key in STATE},
        "picture_kept": round(picture_kept(last), 4),
        **{key: round(after[key] - before[key], 3) for key in COUNTERS},
    }


class Records:
    """What has been measured, one line each in a file that survives being killed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[str, int, int], dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # killed while writing
                self._keep(json.loads(line))

    def _keep(self, record: dict[str, Any]) -> None:
        self.found[record["arm"], record["seed"], record["side"]] = record

    @staticmethod
    def name(name: str, experiment: Experiment) -> str:
        """Of the file: answers of arms that were defined otherwise are in another one."""
        defined = repr((FLAGS, THRESHOLD, experiment.arms, experiment.model, experiment.again)).encode()
        return f"{name}-{hashlib.blake2b(defined, digest_size=4).hexdigest()}.jsonl"

    def add(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"\n{json.dumps(record)}")
        self._keep(record)

    def missing(self, experiment: Experiment) -> list[tuple[Arm, int, int]]:
        """Picture by picture, arms in an order that rotates, so that a slow minute falls on all of them."""
        work = []
        for number, (seed, side) in enumerate(experiment.pictures):
            turn = number % len(experiment.arms)
            work += [(arm, seed, side) for arm in (*experiment.arms[turn:], *experiment.arms[:turn])]
        return [(arm, seed, side) for arm, seed, side in work if (arm.name, seed, side) not in self.found]


def servers_in_turn(experiment: Experiment, work: Sequence[tuple[Arm, int, int]]) -> Iterator[list[tuple[str, ...]]]:
    """Flags of the servers that are alive together."""
    needed = {arm.flags for arm, _, _ in work}
    flags = [own for own in dict.fromkeys(arm.flags for arm in experiment.arms) if own in needed]
    for begin in range(0, len(flags), experiment.together):
        yield flags[begin : begin + experiment.together]


def run(name: str, experiment: Experiment, records: Records, console: Console) -> None:
    """Measure what is missing."""
    work = records.missing(experiment)
    model = make_model(ROOT / RANDOM_WEIGHTS) if experiment.model == RANDOM_WEIGHTS else experiment.model
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(name, total=len(work))
        for flags in servers_in_turn(experiment, work):
            mine = [item for item in work if item[0].flags in flags]
            with contextlib.ExitStack() as stack:
                servers = {}
                for number, own in enumerate(flags, 1):
                    progress.update(task, description=f"{name}: server {number} of {len(flags)} starts")
                    process = ServerProcess(model, [*FLAGS, *own], title=" ".join((name, *own)), timeout_s=600.0)
                    servers[own] = stack.enter_context(process)
                http = stack.enter_context(httpx.Client(timeout=300.0))
                # The first requests of a process pay for lazy imports and first allocations.
                for arm in {arm.name: arm for arm, _, _ in mine}.values():
                    measure(http, servers[arm.flags], arm, WARM_UP_SEED, SIDE, again=False)
                for arm, seed, side in mine:
                    progress.update(task, description=f"{name}: {arm.name}, picture {seed}")
                    records.add(measure(http, servers[arm.flags], arm, seed, side, experiment.again))
                    progress.advance(task)


# -- the task ---------------------------------------------------------------------------------------------------------


def result_path(name: str) -> Path:
    """Where a finished experiment is committed."""
    return RESULTS / f"sharing-{name}.json"


def committed() -> dict[str, dict[str, Any]]:
    """The results that there are, by name."""
    names = (*experiments(), *OFFLINE)
    return {name: json.loads(result_path(name).read_text()) for name in names if result_path(name).exists()}


def write_result(name: str, experiment: Experiment, records: Records, host: Mapping[str, Any]) -> str:
    """A finished experiment, in the order of its arms and pictures; returns how to name its file."""
    order = {arm.name: number for number, arm in enumerate(experiment.arms)}
    mine = [r for r in records.found.values() if r["arm"] in order]
    mine.sort(key=lambda record: (order[record["arm"]], record["side"], record["seed"]))
    result = {
        "task": "sharing",
        "experiment": name,
        "command": f"python benchmarks/run.py sharing {name}",
        "host": host,
        "model": experiment.model if experiment.model != RANDOM_WEIGHTS else MODEL_NAME,
        "server_flags": list(FLAGS),
        "arms": {arm.name: {"flags": list(arm.flags), "custom_params": dict(arm.params)} for arm in experiment.arms},
        "threshold": THRESHOLD,
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "summary": summarise(mine),
        "records": mine,
    }
    return save(result_path(name), result, dump(result))


def write_page() -> None:
    """Tables between the page's markers and the figures beside it, from the committed results."""
    results = committed()
    PAGE.write_text(rendered(PAGE.read_text(), results))
    draw_plots(results)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `run.py sharing`."""
    names = [*experiments(), *OFFLINE]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(names)}; default: what is missing")
    parser.add_argument("--quick", action="store_true", help="one picture: does it run?  Writes to out/")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--page", action="store_true", help="only make tables and figures again")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run what is missing, then write the page."""
    os.chdir(ROOT)  # paths are part of the results
    found = experiments()
    if unknown := set(arguments.names) - {*found, *OFFLINE}:
        console.print(f"no such experiment: {', '.join(sorted(unknown))}; there are {', '.join((*found, *OFFLINE))}")
        return 2
    chosen = arguments.names or [name for name in (*found, *OFFLINE) if not result_path(name).exists()]
    with interruptible():
        for name in chosen if not arguments.page else ():
            console.rule(name)
            host = host_block()
            if name in OFFLINE:
                OFFLINE[name](result_path(name), host, arguments.quick, console)
                continue
            experiment = found[name]
            if arguments.quick:
                experiment = experiment._replace(pictures=experiment.pictures[:1])
            folder = OUT / "quick" if arguments.quick else OUT
            path = folder / Records.name(name, experiment)
            if arguments.fresh:
                path.unlink(missing_ok=True)
            records = Records(path)
            run(name, experiment, records, console)
            if not arguments.quick:
                console.print(f"written: {write_result(name, experiment, records, host)}")
    if not arguments.quick:
        write_page()
    return 0
