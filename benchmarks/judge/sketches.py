"""Which sketch of evicted keys finds what an answer attends to: tokens found and attention found, at equal bytes.

A real pretrained language model reads a text with the full cache and is given the right answer.  For each row of the
answer, layer and query head the tokens that a policy evicted are ranked by each sketch.

    python -m benchmarks.judge.sketches                    # development seeds; writes the page
    python -m benchmarks.judge.sketches --tasks needle:1600 --seeds 102-102    # to out/ only
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.judge.turn import Moments, moments, spread
from vlcache_sgl.evaluation.tasks.reading import FIRST_DEVELOPMENT_SEED
from vlcache_sgl.policy import resolve

from ..common.host import ROOT, command_line, host_block
from ..common.results import save
from . import recall_page, sketching
from .cases import CaseId
from .decisions import Decisions
from .main import ASKED, MODEL, WEIGHTS, ArgumentError, dump, model_weights, read_seeds, read_task
from .recalling import FITTED, SketchName, layer_moments
from .sketching import Estimate, Text
from .verdicts import Judge

SEEDS = str(FIRST_DEVELOPMENT_SEED)
POLICIES, BUDGETS = ("vlcache", "keydiff"), (0.1,)
COUNTS = (16, 32, 64, 128)
QUICK = ROOT / "out/judge/sketches.json"


def sketches(judge: Judge) -> dict[str, tuple[float, Estimate]]:
    """Bytes of a token at D = 64, beside what a prompt needs once, and the estimate; other sizes in proportion."""
    network, cases = judge.network, judge.cases
    dim = network.shape.head_dim
    mixed, four_bits = ((dim // 8, 4), (dim * 3 // 8, 2)), ((dim * 5 // 16, 4),)
    before = partial(sketching.before_rotary, profile=four_bits, rotary=network.rotary)
    found: dict[str, tuple[float, Estimate]] = {
        "the keys themselves": (128, sketching.exact),
        "signs after a random rotation, a factor": (10, sketching.signs),
        "the same about the prompt's mean key": (10, partial(sketching.signs, centred=True)),
        "a bit per channel between the prompt's means": (8, sketching.channels),
        "least and greatest key of 13 tokens, 8 bit": (9.8, partial(sketching.extremes, size=13)),
        "mean key of 6 tokens, 8 bit": (10.7, partial(sketching.page_means, size=6)),
        "low rank of the prompt's keys, 4 bit": (10, partial(sketching.own_basis, profile=four_bits, joint=False)),
        "the same before the rotary embedding": (10, before),
        "low rank of the prompt's logits, 4 bit": (10, partial(sketching.own_basis, profile=four_bits)),
        "the same, 4 and 2 bit": (10, partial(sketching.own_basis, profile=mixed)),
    }
    titles: dict[SketchName, str] = {"text": "a text", "random": "random tokens"}
    for name, title in titles.items():
        layers = layer_moments(name, network, cases)
        one = Moments(*(torch.cat(parts) for parts in zip(*layers, strict=True)))
        found[f"signs after the model's turn, by {title}"] = (
            10,
            partial(sketching.turned, seen=spread(one, network.rotary)),
        )
        found[f"the same, for its {FITTED} positions alone, by {title}"] = (10, partial(sketching.turned, seen=one))
    model = partial(sketching.model_basis, seen=spread(one, network.rotary), profile=mixed)
    found["low rank of the model's logits, 4 and 2 bit"] = (10, model)
    return found


@dataclass
class Sums:
    """Of one sketch at one count: sums over rows."""

    found: float = 0.0
    """Share of each query head's best evicted tokens that are the sketch's best, too."""
    heads: int = 0
    mass: float = 0.0
    """Attention on the tokens that a layer would fetch, sum over its heads."""
    missing: float = 0.0
    """Attention on evicted tokens."""


Key = tuple[str, str, float, int]
"""Sketch, policy, budget, tokens."""


def measure(text: Text, estimate: torch.Tensor, own: torch.Tensor, kept: torch.Tensor, layers: int) -> Iterator[Sums]:
    """Sums for each of COUNTS.

    Args:
        text: keys and rows.
        estimate: `[B, r, n]`.
        own: `[B, r, t]` logits of the answer's own tokens.
        kept: `[B, n]` bool.
        layers: L; B is L times K.
    """
    count = kept.shape[-1]
    hidden = kept[:, None]
    true = text.rows @ text.keys.mT
    missed = torch.cat([true, own], -1).softmax(-1)[..., :count] * ~hidden
    true, near = true.masked_fill(hidden, -torch.inf), estimate.masked_fill(hidden, -torch.inf)
    steps = own.shape[-1]

    def by_layer(shares: torch.Tensor) -> torch.Tensor:
        """Sum over a layer's heads `[L, t, n]`."""
        return shares.view(layers, -1, steps, count).sum(1)

    wanted, guessed = by_layer(missed), by_layer(near.softmax(-1).nan_to_num(0.0))
    for most in COUNTS:
        best, mine = (_best(logits, most) for logits in (true, near))
        right = (best & mine & ~hidden).sum(-1) / (best & ~hidden).sum(-1).clamp(min=1)
        fetched = _best(guessed, most)
        yield Sums(float(right.sum()), right.numel(), float((wanted * fetched).sum()), float(wanted.sum()))


def _best(values: torch.Tensor, most: int) -> torch.Tensor:
    places = values.topk(min(most, values.shape[-1]), dim=-1).indices
    return torch.zeros(values.shape, dtype=torch.bool).scatter_(-1, places, True)


class Comparison:
    """All sketches on one case after the other."""

    def __init__(self, judge: Judge, policies: Sequence[str], budgets: Sequence[float]) -> None:
        self._judge, self._policies, self._budgets = judge, policies, budgets
        self.sums: dict[Key, Sums] = {}
        self.sketches = sketches(judge)

    @torch.inference_mode()
    def add(self, name: CaseId) -> None:
        """Rank what each policy evicts of a case."""
        network, cases = self._judge.network, self._judge.cases
        asked = cases.make(name).first
        _, states = network.read((*asked.prompt, *asked.answer[:-1]))
        prompt = states.first(len(asked.prompt))
        layers, kv_heads, count, dim = prompt.keys.shape
        steps = states.length - count
        scaled = states.queries[:, :, count:] * dim**-0.5
        rows = scaled.reshape(layers * kv_heads, -1, dim)  # [B, g t, D]
        seen = _moments(prompt.keys, prompt.queries)
        text = Text(prompt.keys.flatten(0, 1), rows, seen)
        own = rows @ states.keys[:, :, count:].flatten(0, 1).mT
        future = torch.ones(steps, steps, dtype=torch.bool).triu(1).repeat(rows.shape[1] // steps, 1)
        own = own.masked_fill(future, -torch.inf)
        decisions = Decisions(
            network, asked.prompt, prompt, asked.lines, "text", cases.instruction, self._judge.weights
        )
        kept = {
            (p, b): decisions.keep(resolve(p), b).cells.flatten(0, 1) for p in self._policies for b in self._budgets
        }
        for sketch, (_, estimate) in self.sketches.items():
            logits = estimate(text)
            for (policy, budget), cells in kept.items():
                for most, sums in zip(COUNTS, measure(text, logits, own, cells, layers), strict=True):
                    total = self.sums.setdefault((sketch, policy, budget, most), Sums())
                    for field, value in vars(sums).items():
                        setattr(total, field, getattr(total, field) + value)

    def summary(self) -> list[dict[str, Any]]:
        """A row per sketch, kept set and count: shares in [0, 1]."""
        return [
            {
                "sketch": sketch,
                "bytes": self.sketches[sketch][0],
                "policy": policy,
                "budget": budget,
                "tokens": most,
                "found": round(sums.found / sums.heads, 4),
                "mass": round(sums.mass / sums.missing, 4),
            }
            for (sketch, policy, budget, most), sums in self.sums.items()
        ]


def _moments(keys: torch.Tensor, queries: torch.Tensor) -> Moments:
    """Of states `[L, K, n, D]` and `[L, H, n, D]`, all KV heads in one."""
    return moments(keys.flatten(0, 1).transpose(0, 1), queries.flatten(0, 1).transpose(0, 1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--model", type=Path, default=ROOT / MODEL, help=f"checkpoint folder; default {MODEL}")
    parser.add_argument("--weights", metavar="FILE", default=str(WEIGHTS), help="as for `python -m benchmarks.judge`")
    parser.add_argument("--tasks", nargs="+", metavar="TASK:TOKENS", default=ASKED)
    parser.add_argument("--seeds", metavar="FIRST-LAST", default=SEEDS)
    parser.add_argument("--policies", nargs="+", metavar="POLICY", default=POLICIES)
    parser.add_argument("--budgets", nargs="+", type=float, metavar="SHARE", default=BUDGETS)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/ for everything, out/ for less")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Compare, write the result, and the page if the result is the committed one."""
    try:
        cases = [CaseId(*read_task(task), seed) for seed in read_seeds(arguments.seeds) for task in arguments.tasks]
        weights = model_weights(arguments)
    except ArgumentError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2
    started = host_block()
    torch.set_num_threads(2)
    comparison = Comparison(Judge(arguments.model, weights), arguments.policies, arguments.budgets)
    for case in cases:
        comparison.add(case)
        console.print(case.name)
    result: Mapping[str, Any] = {
        "task": "judge-sketches",
        "command": command_line(),
        "host": started,
        "seeds": arguments.seeds,
        "tasks": list(arguments.tasks),
        "summary": comparison.summary(),
    }
    output = arguments.output or (recall_page.SKETCHES if len(sys.argv) == 1 else QUICK)
    save(output, result, dump(result))
    for policy in arguments.policies:
        for budget in arguments.budgets:
            console.print(f"\n{policy} at {budget:g}: tokens found, attention found")
            console.print(recall_page.sketches_table(result, policy, budget), soft_wrap=True, markup=False)
    if output.resolve() == recall_page.SKETCHES:
        recall_page.write()
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    sys.exit(main(parser.parse_args(), Console() if sys.stdout.isatty() else Console(width=140)))
