"""`vlcache calibrate`: which layers do later questions about a shared picture read?  Measured once per model.

Question 1 about a picture compresses it without looking at itself, the next questions find that copy; what counts is
how many of them are answered as by the full cache.  Layers are lowered one after the other as long as the score holds,
then emptied where nothing is lost.  The result is a profile, one share per layer, that `allocator=table` reads.

Every answer is written down at once: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlcache_sgl._version import __version__
from vlcache_sgl.cli.client import Client, said
from vlcache_sgl.cli.console import table_console
from vlcache_sgl.cli.eval import AT_ONCE, dump, minutes, progress_bar, server_block
from vlcache_sgl.cli.server import RunningServer, ServerError, interruptible
from vlcache_sgl.cli.target import add_target_arguments, target
from vlcache_sgl.fidelity.data import NUM_QUESTIONS, DataError, Sample, load_jsonl, receipts
from vlcache_sgl.fidelity.profile import GROUPS, ExhaustedError, Found, Shares, mean_share, most_trials, search
from vlcache_sgl.fidelity.run import FULL, Answers, Condition, EvalError, Record, ask_all, missing
from vlcache_sgl.policy import resolve

PROFILE = "profile.json"
PICTURES, QUESTIONS, SEED = 16, 8, 50_000
TOLERANCE = 0.02
MAX_TRIALS = 150
FLAGS = ("--kv-policy", "vlcache", "--kv-budget", "0.1", "--kv-budget-max", "1.0", "--kv-allow-policies", "*")
"""Of a server that is started here; each request names its own policy and budget."""
_BOUND = "0.999"
"""Budget of every trial: with `basis=vision` an upper bound that never binds; 1.0 would mean no compression."""
_WIDTH = 110


class OutOfTimeError(Exception):
    """The time limit is over."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the calibration; returns the exit code, 3 when it is not finished."""
    arguments = _parser().parse_args(argv)
    console = table_console(_WIDTH)
    profile = arguments.profile or arguments.output / PROFILE
    try:
        check(arguments)
        samples = samples_of(arguments)
        with interruptible(), target(arguments, FLAGS, console) as server:
            result, found = calibrate(server, samples, arguments, console)
    except OutOfTimeError:
        console.print(f"the time is over; the same command goes on from {arguments.output}")
        return 3
    except (DataError, EvalError, ServerError, ValueError) as error:
        console.print(f"vlcache calibrate: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on from {arguments.output}")
        return 130
    result["command"] = shlex.join(["vlcache", "calibrate", *(sys.argv[1:] if argv is None else argv)])
    profile.parent.mkdir(parents=True, exist_ok=True)
    profile.write_text(dump(result))
    console.print(layer_table(found))
    console.print(
        f"share {result['share']:.3f} of the picture, {result['kept']:.3f} of the prompt; later answers as the full "
        f"cache's {result['score']:.2f}, right {result['right']:.2f} (full cache {result['full_right']:.2f}), "
        f"n = {result['n']['later']}"
    )
    if not found.finished:
        console.print(f"stopped after {len(result['trials'])} trials (--max-trials); more may find a smaller profile")
    console.print(f"written: {profile}", soft_wrap=True)
    console.print(
        f"to use it: --kv-policy scorer={arguments.scorer},allocator=table,file={profile},basis=vision,protect=text",
        soft_wrap=True,
    )
    return 0


def policy_text(scorer: str, shares: Shares) -> str:
    """A trial, as a value of `kv_policy`: the shares are of the picture, text stays whole.

    >>> policy_text("keydiff", (1.0, 0.25, 0.0))
    'scorer=keydiff,allocator=table,weights=1/0.25/0,basis=vision,protect=text'
    """
    weights = "/".join(f"{share:g}" for share in shares)
    return f"scorer={scorer},allocator=table,weights={weights},basis=vision,protect=text"


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before a server is started.

    Raises:
        ValueError: with the reason.
    """
    if arguments.questions < 2:
        raise ValueError("--questions: at least 2, the first one only compresses the picture")
    if min(arguments.pictures, arguments.max_trials, arguments.groups, arguments.at_once) < 1:
        raise ValueError("--pictures, --max-trials, --groups and --at-once must be at least 1")
    if not 0 <= arguments.tolerance < 1:
        raise ValueError(f"--tolerance {arguments.tolerance:g}: a share in [0, 1)")
    if resolve(policy_text(arguments.scorer, (1.0,)), from_request=True).query_aware:
        raise ValueError(
            f"--scorer {arguments.scorer} looks at the first question, and would measure what that needs; "
            "choose one that is not query-aware (`vlcache policies` lists them)"
        )


def samples_of(arguments: argparse.Namespace) -> list[Sample]:
    """Pictures with at least two questions each, cut to `--questions`; of files so many, drawn by `--seed`.

    Raises:
        DataError: when no picture has two questions.
    """
    if not arguments.data:
        numbers = range(arguments.seed, arguments.seed + arguments.pictures)
        return [receipts(seed, min(arguments.questions, NUM_QUESTIONS)) for seed in numbers]
    found = [sample for path in arguments.data for sample in load_jsonl(path) if len(sample.questions) > 1]
    if not found:
        raise DataError("no picture has two questions: what later questions need cannot be measured")
    chosen = random.Random(arguments.seed).sample(found, min(arguments.pictures, len(found)))
    # The number of questions belongs to the name: answers to fewer questions are no answers to these.
    return [
        dataclasses.replace(sample, id=f"{sample.id} x{len(questions)}", questions=questions)
        for sample in chosen
        for questions in (sample.questions[: arguments.questions],)
    ]


def calibrate(
    server: RunningServer, samples: Sequence[Sample], arguments: argparse.Namespace, console: Console
) -> tuple[dict[str, Any], Found]:
    """Measure; the profile and what the search has found.

    Raises:
        EvalError: when the server refuses a request or does not compress.
        OutOfTimeError: at the time limit; what has been asked is written down.
    """
    info = server.server_info()
    model = str(info.get("served_model_name") or info["model_path"])
    answers = Answers(arguments.output, model)
    client = Client(server.openai_url)
    layers, seconds = probe(client, samples[0], arguments.scorer)
    limit = min(arguments.max_trials, most_trials(layers, arguments.groups))
    questions = sum(len(sample.questions) for sample in samples)
    console.print(
        f"{layers} layers; at most {limit} trials of {len(samples)} pictures and {questions} questions. "
        f"A question with a picture takes {seconds:.1f} s: at most about {minutes(limit * questions * seconds)}."
    )
    deadline = time.monotonic() + 60 * arguments.time_limit if arguments.time_limit else None
    with progress_bar(console) as progress:
        bar = progress.add_task("full cache", total=(limit + 2) * questions)
        trials = Trials(
            client, samples, answers, arguments, deadline, lambda: progress.advance(bar), limit=limit, layers=layers
        )
        full = trials.full()

        def measure(shares: Shares) -> float:
            progress.update(bar, description=f"share {mean_share(shares):.2f}", completed=trials.asked)
            return trials.measure(shares)

        found = search(layers, measure, full["score"] - arguments.tolerance - 1e-9, arguments.groups)
        progress.update(bar, total=trials.asked, completed=trials.asked)
    best = next((trial for trial in trials.done if trial["weights"] == list(found.shares)), full)
    result = {
        "model": model,
        "weights": list(found.shares),
        "share": round(mean_share(found.shares), 4),
        "score": best["score"],
        "right": best["right"],
        "kept": best["kept"],
        "full_score": full["score"],
        "full_right": full["right"],
        "tolerance": arguments.tolerance,
        "scorer": arguments.scorer,
        "n": {"pictures": len(samples), "questions": questions, "later": questions - len(samples)},
        "samples": [sample.id for sample in samples],
        "without": {str(layer): score for layer, score in sorted(found.alone.items())},
        "finished": found.finished,
        "vlcache": __version__,
        "server": server_block(info),
        "trials": trials.done,
    }
    return result, found


def probe(client: Client, sample: Sample, scorer: str) -> tuple[int, float]:
    """The number of layers, and seconds of a question with a picture; asked twice, the first time warms up.

    Raises:
        EvalError: when the server refuses the policy or does not compress the picture.
    """
    params = {"kv_policy": f"scorer={scorer},allocator=uniform,protect=text", "kv_budget": "0.5"}
    seconds, report = 0.0, {}
    for _ in range(2):
        salt = f"probe-{time.time_ns()}"
        started = time.perf_counter()
        try:
            answer = client.ask(
                sample.questions[0].text,
                *sample.open_images(),
                max_tokens=sample.questions[0].max_tokens,
                custom_params=params,
                cache_salt=salt,
                return_meta_info=True,
            )
        except Exception as error:
            raise EvalError(said(error)) from error
        seconds, report = time.perf_counter() - started, dict(answer.report)
    if "kept_tokens_per_layer" not in report:
        why = report.get("failed") or report.get("skipped") or "the server does not say why"
        raise EvalError(f"{sample.id} was not compressed: {why}")
    return len(report["kept_tokens_per_layer"]), seconds


class Trials:
    """Settings that have been measured on a server; answers of an earlier run count."""

    def __init__(
        self,
        client: Client,
        samples: Sequence[Sample],
        answers: Answers,
        arguments: argparse.Namespace,
        deadline: float | None,
        on_answer: Callable[[], None],
        *,
        limit: int,
        layers: int,
    ) -> None:
        self._client = client
        self._samples = samples
        self._answers = answers
        self._arguments = arguments
        self._deadline = deadline
        self._on_answer = on_answer
        self._limit = limit
        self._layers = layers
        self.done: list[dict[str, Any]] = []
        """In the order of the search: `weights`, `share`, and what `_summary` says."""
        self.asked = 0
        """Questions whose answers are known."""

    def full(self) -> dict[str, Any]:
        """The full cache, compared with itself when asked again: what a server's own noise costs."""
        self._ask(Condition(None, "1.0"))
        again = Condition(policy_text(self._arguments.scorer, (1.0,) * self._layers), "1.0")
        return self._summary(self._ask(again))

    def measure(self, shares: Shares) -> float:
        """Share of later answers that are the full cache's.

        Raises:
            ExhaustedError: when so many settings have been measured.
        """
        if len(self.done) >= self._limit:
            raise ExhaustedError
        records = self._ask(Condition(policy_text(self._arguments.scorer, shares), _BOUND))
        for record in records:
            first = record["questions"][0]
            if "failed" in first or first["ratio"] >= 1:
                why = first.get("failed", "nothing was evicted")
                raise EvalError(f"{record['condition']}, {record['sample']}: not compressed: {why}")
        summary = self._summary(records)
        self.done.append({"weights": list(shares), "share": round(mean_share(shares), 4), **summary})
        return float(summary["score"])

    def _ask(self, condition: Condition) -> list[Record]:
        """The records of all samples, what is missing asked now."""
        work = missing(self._samples, [condition], self._answers.done())
        left = None if self._deadline is None else max(1e-6, self._deadline - time.monotonic())
        asking = ask_all(
            self._client,
            work,
            self._answers,
            at_once=self._arguments.at_once,
            time_limit_s=left,
            on_answer=self._on_answer,
        )
        for _ in asking:
            pass
        if missing(self._samples, [condition], self._answers.done()):
            raise OutOfTimeError
        found = self._of(condition.name)
        self.asked += sum(len(record["questions"]) for record in found)
        return found

    def _of(self, name: str) -> list[Record]:
        known = {r["sample"]: r for r in self._answers.records if r["condition"] == name}
        return [known[sample.id] for sample in self._samples]

    def _summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """`score`: later answers that are the full cache's; `right`: mean metric of later answers; `kept`: cells of the
        prompt that question 1 left, text included; `n`: later answers."""
        pairs = [
            (mine, theirs)
            for record, full in zip(records, self._of(FULL), strict=True)
            for mine, theirs in zip(record["questions"][1:], full["questions"][1:], strict=True)
        ]
        count = len(pairs)
        return {
            "score": round(sum(mine["answer"] == theirs["answer"] for mine, theirs in pairs) / count, 4),
            "right": round(sum(mine["score"] for mine, _ in pairs) / count, 4),
            "kept": round(sum(record["questions"][0]["ratio"] for record in records) / len(records), 4),
            "n": count,
        }


def layer_table(found: Found) -> Table:
    """The profile for people."""
    table = Table()
    for name in ("layer", "keeps", "as the full cache without it"):
        table.add_column(name, justify="right")
    for layer, share in enumerate(found.shares):
        alone = found.alone.get(layer)
        table.add_row(str(layer), f"{share:g}", "" if alone is None else f"{alone:.2f}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlcache calibrate", description=(__doc__ or "").split(": ", 1)[1])
    data = parser.add_argument_group("what is asked")
    data.add_argument(
        "--data", nargs="+", type=Path, default=[], metavar="FILE", help="JSONL files; default: bundled receipts"
    )
    data.add_argument("--pictures", type=int, default=PICTURES, help=f"default: {PICTURES}")
    data.add_argument(
        "--questions", type=int, default=QUESTIONS, help=f"per picture, the first one included; default: {QUESTIONS}"
    )
    data.add_argument("--seed", type=int, default=SEED, help=f"of the pictures that are taken; default: {SEED}")
    how = parser.add_argument_group("the search")
    how.add_argument(
        "--scorer", default="keydiff", metavar="NAME[,key=value]", help="chooses a layer's tokens; default: keydiff"
    )
    how.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"score that may be lost, a share; default: {TOLERANCE:g}"
    )
    how.add_argument(
        "--groups",
        type=int,
        default=GROUPS,
        help=f"layers are tried in so many groups of neighbours first; default: {GROUPS}",
    )
    how.add_argument("--max-trials", type=int, default=MAX_TRIALS, help=f"default: {MAX_TRIALS}")
    add_target_arguments(parser)
    run = parser.add_argument_group("the run")
    run.add_argument("--output", type=Path, default=Path("out/calibrate"), help="folder of the answers")
    run.add_argument("--profile", type=Path, metavar="FILE", help=f"the result; default: {PROFILE} in that folder")
    run.add_argument("--at-once", type=int, default=AT_ONCE, help=f"pictures in flight; default: {AT_ONCE}")
    run.add_argument("--time-limit", type=float, metavar="MINUTES", help="begin nothing after that")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
