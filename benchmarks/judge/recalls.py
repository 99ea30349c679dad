"""What a real pretrained language model answers when evicted tokens come back at each decode step.

Each case is written down at once, so that an interrupted run goes on where it stopped.

    python -m benchmarks.judge.recalls                                    # all tasks and test seeds, then the page
    python -m benchmarks.judge.recalls --seeds 100-103 --ranks peak logit # development seeds, to out/ only
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from rich.console import Console

from vlcache_sgl.evaluation.stats import interval, mean
from vlcache_sgl.evaluation.tasks.reading import FIRST_TEST_SEED
from vlcache_sgl.policy import PolicyError, resolve

from ..common.host import ROOT, command_line, host_block
from ..common.results import save
from . import recall_page
from .cases import Asked, CaseId
from .conditions import MEDIA
from .decisions import Decisions, Medium
from .main import ASKED, MODEL, WEIGHTS, ArgumentError, dump, model_weights, read_seeds, read_task
from .network import Past, States
from .recalling import DEFAULT, Among, Beside, Rank, Recalling, Rule, Sketch, SketchName, layer_sketches
from .records import digest
from .verdicts import Judge

SEEDS = f"{FIRST_TEST_SEED}-{FIRST_TEST_SEED + 24}"
POLICIES = ("vlcache", "vlcache:heads=split", "keydiff", "snapkv", "streaming", "random")
BUDGETS = (0.2, 0.1)
TOKENS = (0, 16, 32, 64, 128)
ANSWERS, QUICK = ROOT / "out/judge/recalls.jsonl", ROOT / "out/judge/recalls.json"


@dataclass(frozen=True)
class Arm:
    """What is kept of a text, and what comes back of the rest."""

    medium: Medium
    policy: str
    budget: float
    rule: Rule

    @property
    def name(self) -> str:
        """Unique: ``text vlcache@0.1 64 layer logit evicted signs``."""
        return f"{self.medium} {self.policy}@{self.budget:g} {self.rule.name}"


class Answer(NamedTuple):
    """How one arm did with one question."""

    right: bool
    log_probability: float
    """Of the right answer, in nats."""
    fetched: float
    """Layers that fetched, of those that were asked, in [0, 1]."""


FULL = "full"
"""Name of the answer of the full cache."""
Found = dict[str, Answer]


class Recalls:
    """Answers with recall, of one checkpoint."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._sketches: dict[SketchName, list[Sketch]] = {}

    @torch.inference_mode()
    def answers(self, name: CaseId, arms: Sequence[Arm]) -> Found:
        """By the arm's name, and FULL."""
        network, cases = self._judge.network, self._judge.cases
        asked = cases.make(name).first
        hidden, states = network.read(asked.prompt)
        first = network.log_probabilities(hidden[-1])
        begin = Answer(int(first.argmax()) == asked.answer[0], float(first[asked.answer[0]]), 0.0)
        everything = torch.ones(*states.keys.shape[:1], 1, *states.keys.shape[1:3], dtype=torch.bool)
        found = {FULL: self._follow(asked, states, everything, None, begin)[0]}
        kept: dict[tuple[str, str, float], torch.Tensor] = {}
        for medium, mine in _groups(arms, lambda arm: arm.medium):
            decisions = Decisions(
                network, asked.prompt, states, asked.lines, medium, cases.instruction, self._judge.weights
            )
            for arm in mine:
                key = (arm.medium, arm.policy, arm.budget)
                if key not in kept:
                    kept[key] = decisions.keep(resolve(arm.policy), arm.budget).cells
        for _, mine in _groups(arms, lambda arm: arm.rule.with_tokens(0)):
            keep = torch.stack([kept[arm.medium, arm.policy, arm.budget] for arm in mine], dim=1)
            rule = mine[0].rule
            if rule.sketch not in self._sketches:
                self._sketches[rule.sketch] = layer_sketches(rule.sketch, network, cases)
            recall = Recalling(states, keep, rule, [arm.rule.tokens for arm in mine], self._sketches[rule.sketch])
            found |= zip((arm.name for arm in mine), self._follow(asked, states, keep, recall, begin), strict=True)
        return found

    def _follow(
        self, asked: Asked, states: States, keep: torch.Tensor, recall: Recalling | None, begin: Answer
    ) -> list[Answer]:
        """The first token comes from the prefill, which sees everything."""
        network = self._judge.network
        log = network.log_probabilities(network.follow(asked.answer[:-1], Past(states, keep), recall))
        wanted = torch.tensor(asked.answer[1:])
        right = (log.argmax(-1) == wanted).all(-1).tolist()
        gained = log.gather(-1, wanted.expand(len(log), -1)[..., None]).sum((1, 2)).tolist()
        fetched = [0.0] * len(log) if recall is None else recall.fetched.tolist()
        rows = zip(right, gained, fetched, strict=True)
        return [Answer(r and begin.right, g + begin.log_probability, f) for r, g, f in rows]


def _groups(arms: Sequence[Arm], key: Any) -> Iterator[tuple[Any, list[Arm]]]:
    found: dict[Any, list[Arm]] = {}
    for arm in arms:
        found.setdefault(key(arm), []).append(arm)
    yield from found.items()


# -- records -----------------------------------------------------------------------------------------------------------


def read_records(path: Path, stamp: str) -> dict[CaseId, Found]:
    """What was answered before by the same weights and sketch; a line that was cut off is dropped."""
    found: dict[CaseId, Found] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["stamp"] == stamp:
            answers = {name: Answer(*answer) for name, answer in record["answers"].items()}
            found.setdefault(CaseId(*record["case"]), {}).update(answers)
    return found


def summarise(found: Mapping[CaseId, Found], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """A row per arm: right answers with interval, log-probability in nats, and those of the full cache on the same."""
    rows = []
    for arm in arms:
        mine = {case.name: (answers[arm.name], answers[FULL]) for case, answers in sorted(found.items())}
        right = {name: [float(answer.right)] for name, (answer, _) in mine.items()}
        rows.append(
            {
                "medium": arm.medium,
                "policy": arm.policy,
                "budget": arm.budget,
                "rule": {field.name: getattr(arm.rule, field.name) for field in fields(Rule)},
                "count": len(mine),
                "score": round(mean(right), 4),
                "interval": [round(end, 4) for end in interval(right)],
                "full_score": round(sum(full.right for _, full in mine.values()) / len(mine), 4),
                "log_probability": round(sum(a.log_probability for a, _ in mine.values()) / len(mine), 3),
                "full_log_probability": round(sum(full.log_probability for _, full in mine.values()) / len(mine), 3),
                "fetched": round(sum(answer.fetched for answer, _ in mine.values()) / len(mine), 4),
                "answers": "".join(str(int(answer.right)) for answer, _ in mine.values()),
            }
        )
    return rows


# -- the program -------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--model", type=Path, default=ROOT / MODEL, help=f"checkpoint folder; default {MODEL}")
    parser.add_argument("--tasks", nargs="+", metavar="TASK:TOKENS", default=ASKED)
    parser.add_argument("--seeds", metavar="FIRST-LAST", default=SEEDS)
    parser.add_argument("--policies", nargs="+", metavar="POLICY", default=POLICIES)
    parser.add_argument("--budgets", nargs="+", type=float, metavar="SHARE", default=BUDGETS)
    parser.add_argument("--media", nargs="+", choices=MEDIA, default=MEDIA)
    parser.add_argument("--weights", metavar="FILE", default=str(WEIGHTS), help="as for `python -m benchmarks.judge`")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="recalled per layer and step")
    parser.add_argument("--among", nargs="+", choices=get_args(Among), default=(DEFAULT.among,))
    parser.add_argument("--ranks", nargs="+", choices=get_args(Rank), default=(DEFAULT.rank,))
    parser.add_argument("--beside", nargs="+", choices=get_args(Beside), default=(DEFAULT.beside,))
    parser.add_argument("--thresholds", nargs="+", type=float, default=(0.0,))
    parser.add_argument("--sketches", nargs="+", choices=get_args(SketchName), default=(DEFAULT.sketch,))
    parser.add_argument("--rest", action="store_true", help="count what does not come back by the sketch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--answers", type=Path, default=ANSWERS, help="file of answers to go on with")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/ for everything, out/ for less")
    parser.add_argument("--page", action="store_true", help="ask nothing, write the page again")


def arms_of(arguments: argparse.Namespace) -> list[Arm]:
    """Everything that is asked of each case."""
    rules = [
        Rule(tokens, among, rank, beside, sketch, threshold, arguments.rest)
        for sketch, among, rank, beside, threshold, tokens in itertools.product(
            arguments.sketches,
            arguments.among,
            arguments.ranks,
            arguments.beside,
            arguments.thresholds,
            arguments.tokens,
        )
    ]
    kept = itertools.product(arguments.media, arguments.policies, arguments.budgets)
    return [Arm(*one, rule) for one in kept for rule in rules]


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Ask what is missing, write the result, and the page if the result is the committed one."""
    if arguments.page:
        recall_page.write()
        return 0
    try:
        return _run(arguments, console)
    except (ArgumentError, PolicyError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if not (arguments.model / "model.safetensors").exists():
        raise ArgumentError(f"there is no model in {arguments.model}; `make real-model` builds it")
    started, stamp = host_block(), digest(arguments.model)
    arms = arms_of(arguments)
    cases = [CaseId(*read_task(task), seed) for seed in read_seeds(arguments.seeds) for task in arguments.tasks]
    records = read_records(arguments.answers, stamp)
    torch.set_num_threads(arguments.threads)
    arguments.answers.parent.mkdir(parents=True, exist_ok=True)
    recalls: Recalls | None = None
    with arguments.answers.open("a") as file:
        for done, case in enumerate(cases):
            known = records.setdefault(case, {})
            missing = [arm for arm in arms if arm.name not in known]
            if missing:
                recalls = recalls or Recalls(Judge(arguments.model, model_weights(arguments)))
                found = recalls.answers(case, missing)
                known |= found
                record = {"stamp": stamp, "case": [case.task, case.tokens, case.seed], "answers": found}
                file.write(json.dumps(record) + "\n")
                file.flush()
                console.print(f"{done + 1} of {len(cases)}: {case.name}")
    result = {
        "task": "judge-recalls",
        "command": command_line(),
        "host": started,
        "weights": stamp,
        "seeds": arguments.seeds,
        "tasks": list(arguments.tasks),
        "summary": summarise({case: records[case] for case in cases}, arms),
    }
    whole = all(
        tuple(getattr(arguments, name)) == tuple(value)
        for name, value in {
            "seeds": SEEDS,
            "policies": POLICIES,
            "budgets": BUDGETS,
            "media": MEDIA,
            "tokens": TOKENS,
        }.items()
    )
    output = arguments.output or (recall_page.ANSWERS if whole else QUICK)
    save(output, result, dump(result))
    console.print(recall_page.answers_table(result), soft_wrap=True, markup=False)
    if output.resolve() == recall_page.ANSWERS:
        recall_page.write()
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    sys.exit(main(parser.parse_args(), Console() if sys.stdout.isatty() else Console(width=140)))
