"""How long answers stay those of the full cache, and how often a step needs what an earlier one fetched.

The full cache's greedy answer is given to each arm token by token; agreement is the share of its tokens that the arm
would have chosen, too.  Up to the first that it would not, the arm's own answer is the same.

    python -m benchmarks.judge.loyalty                     # writes the page
    python -m benchmarks.judge.loyalty --seeds 100-101     # development seeds, to out/ only
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from vlcache_sgl.evaluation.tasks.reading import FIRST_TEST_SEED, Question
from vlcache_sgl.policy import resolve
from vlcache_sgl.weights import read_weights

from ..common.host import ROOT, command_line, host_block
from ..common.results import save
from . import recall_page
from .cases import CaseId
from .decisions import Decisions
from .main import MODEL, WEIGHTS, ArgumentError, dump, read_seeds, read_task
from .network import Past, States
from .recalling import DEFAULT, Recalling, Rule, layer_sketches
from .verdicts import Judge

SEEDS = str(FIRST_TEST_SEED)
TASKS = ("needle:400", "list:250")
POLICIES, BUDGETS, TOKENS = ("vlcache", "keydiff"), (0.2, 0.1), (0, 64)
LENGTH = 512
"""Tokens of an answer; its end is ignored."""
SIZES = (1, 2, 4)
"""Of the area in which recalled tokens stay, in multiples of what a step recalls."""
QUESTION = Question("Retell the whole text above in your own words, with everything that it says.", "", " ")
QUICK = ROOT / "out/judge/loyalty.json"


def answers(folder: Path, prompts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Greedy answers of the full cache, all prompts in one batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    most = max(map(len, prompts))
    ids = torch.tensor([[0] * (most - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (most - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False, eos_token_id=None)
    given: list[list[int]] = found[:, most:].tolist()
    return given


def hit_rates(chosen: torch.Tensor, sizes: Sequence[int], total: int) -> list[float]:
    """Share of what steps want that earlier steps left in an area, which drops what was not wanted for longest.

    Args:
        chosen: `[L, t, m]` token numbers, each step's best first; the first step fills the area and does not count.
        sizes: of the area, in multiples of `m`.
        total: tokens that can be chosen.
    """
    layers, steps, count = chosen.shape
    # When each token was last wanted, in steps; of one step's tokens the better ones are the later.
    wanted_at = torch.full((layers, total), -torch.inf)
    hits = [0.0] * len(sizes)
    rank = torch.arange(count) / count
    for step in range(steps):
        mine = chosen[:, step]
        if step:
            before = wanted_at.gather(1, mine)
            for place, size in enumerate(sizes):
                oldest = wanted_at.topk(min(size * count, total), dim=1).values[:, -1:]
                hits[place] += float(((before >= oldest) & before.isfinite()).float().mean())
        wanted_at.scatter_(1, mine, (step + 1 - rank).expand(layers, -1))
    return [hit / (steps - 1) for hit in hits]


class Loyalty:
    """Compares arms with the full cache on one prompt after the other."""

    def __init__(self, judge: Judge, policies: Sequence[str], budgets: Sequence[float], tokens: Sequence[int]) -> None:
        self._judge = judge
        self._sketches = layer_sketches(DEFAULT.sketch, judge.network, judge.cases)
        self._arms = list(itertools.product(policies, budgets, tokens))
        self.same: dict[tuple[str, float, int], list[list[bool]]] = {arm: [] for arm in self._arms}
        self.rates: dict[tuple[str, float, int], list[list[float]]] = {arm: [] for arm in self._arms if arm[2]}

    @torch.inference_mode()
    def compare(self, prompt: tuple[int, ...], lines: Any, answer: Sequence[int]) -> None:
        """Run all arms over the prompt's answer."""
        network = self._judge.network
        _, states = network.read(prompt)
        decisions = Decisions(
            network, prompt, states, lines, "image", self._judge.cases.instruction, self._judge.weights
        )
        everything = torch.ones(*states.keys.shape[:1], *states.keys.shape[1:3], dtype=torch.bool)
        full = self._choices(states, everything, answer, None)
        for arm in self._arms:
            policy, budget, tokens = arm
            keep = decisions.keep(resolve(policy), budget).cells
            rule = Rule(tokens)
            recall = Recalling(states, keep[:, None], rule, [tokens], self._sketches, remember=True) if tokens else None
            self.same[arm].append((self._choices(states, keep, answer, recall) == full).tolist())
            if recall is not None:
                chosen = torch.stack(recall.chosen)[:, 0]
                self.rates[arm].append(hit_rates(chosen, SIZES, states.length))

    def _choices(
        self, states: States, keep: torch.Tensor, answer: Sequence[int], recall: Recalling | None
    ) -> torch.Tensor:
        hidden = self._judge.network.follow(answer[:-1], Past(states, keep[:, None]), recall)
        return self._judge.network.log_probabilities(hidden[0]).argmax(-1)

    def summary(self) -> list[dict[str, Any]]:
        """A row per arm; `first`: tokens before the first that differs, mean over answers."""
        rows = []
        for (policy, budget, tokens), found in self.same.items():
            agreement = sum(map(sum, found)) / sum(map(len, found))
            first = sum(same.index(False) if False in same else len(same) for same in found) / len(found)
            row = {"policy": policy, "budget": budget, "tokens": tokens, "count": len(found)}
            rows.append({**row, "agreement": round(agreement, 4), "first": round(first, 1)})
        return rows

    def hits(self) -> list[dict[str, Any]]:
        """A row per arm that recalls: hit rates by the size of the area."""
        rows = []
        for (policy, budget, tokens), found in self.rates.items():
            columns = zip(SIZES, zip(*found, strict=True), strict=True)
            rates = {str(size): round(sum(column) / len(found), 4) for size, column in columns}
            rows.append({"policy": policy, "budget": budget, "tokens": tokens, "rates": rates})
        return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--model", type=Path, default=ROOT / MODEL, help=f"checkpoint folder; default {MODEL}")
    parser.add_argument("--tasks", nargs="+", metavar="TASK:TOKENS", default=TASKS, help="which texts to retell")
    parser.add_argument("--seeds", metavar="FIRST-LAST", default=SEEDS)
    parser.add_argument("--policies", nargs="+", metavar="POLICY", default=POLICIES)
    parser.add_argument("--budgets", nargs="+", type=float, metavar="SHARE", default=BUDGETS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of an answer")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/ for everything, out/ for less")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Compare, write the result, and the page if the result is the committed one."""
    try:
        cases = [CaseId(*read_task(task), seed) for seed in read_seeds(arguments.seeds) for task in arguments.tasks]
    except ArgumentError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2
    started = host_block()
    torch.set_num_threads(2)
    judge = Judge(arguments.model, read_weights(WEIGHTS))
    asked = [judge.cases.ask(case, QUESTION) for case in cases]
    given = answers(arguments.model, [one.prompt for one in asked], arguments.length)
    loyalty = Loyalty(judge, arguments.policies, arguments.budgets, arguments.tokens)
    for case, one, answer in zip(cases, asked, given, strict=True):
        loyalty.compare(one.prompt, one.lines, answer)
        console.print(case.name)
    result = {
        "task": "judge-loyalty",
        "command": command_line(),
        "host": started,
        "seeds": arguments.seeds,
        "length": arguments.length,
        "hits": loyalty.hits(),
        "summary": loyalty.summary(),
    }
    output = arguments.output or (recall_page.LOYALTY if len(sys.argv) == 1 else QUICK)
    save(output, result, dump(result))
    console.print(recall_page.loyalty_table(result), soft_wrap=True, markup=False)
    if output.resolve() == recall_page.LOYALTY:
        recall_page.write()
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    sys.exit(main(parser.parse_args(), Console() if sys.stdout.isatty() else Console(width=140)))
