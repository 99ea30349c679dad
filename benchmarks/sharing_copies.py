"""Copies for everybody without a server: which score, which layers, how much; and readings beside right answers.

The server's code chooses what the first question needs, and the copies; questions then run behind the picture with
everything else of it hidden, as after a hit.  This is how many combinations are looked at in minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from sharing_page import BUDGET, BUDGETS, FULL, ROWS_READ, SCORERS, copy_name, dump, summarise_copies
from sharing_recorder import MODEL, Recorder
from torch import Tensor

from vlcache_sgl.api import Prompt, Span
from vlcache_sgl.config import KVBudget
from vlcache_sgl.policy import Policy, resolve
from vlcache_sgl.runtime.scoring import Scoring
from vlcache_sgl.runtime.sharing.guard import LAST_ROWS
from vlcache_sgl.runtime.sharing.sketch import KeySketch, missing_share
from vlcache_sgl.runtime.sharing.tier import copy_policy, copy_total, layer_weights, require_agnostic
from vlcache_sgl.tasks.receipts import make_picture

SIDE, QUESTIONS = 24, 8
SEEDS = tuple(seed + i for seed in (60_000, 61_000, 62_000) for i in range(20))
PROFILE = "models/tinyvlm/profiles/grounded.json"
OWN = ("vlcache", KVBudget(fraction=0.1))


class Copy(NamedTuple):
    """One way to choose what stays."""

    name: str
    scorer: str | None
    """None: what the first question's own policy keeps."""
    profile: bool
    """Layers by the profile, in the copy and in the guard; uniform otherwise."""
    budget: float

    @property
    def policy(self) -> str:
        return f"scorer={self.scorer or SCORERS[0]},allocator=" + (
            f"table,file={PROFILE}" if self.profile else "uniform"
        )


def copies() -> list[Copy]:
    """All that are looked at."""
    found = [Copy("policy", None, False, BUDGET), Copy("policy, profile", None, True, BUDGET)]
    for profile in (False, True):
        pairs = [(scorer, BUDGET) for scorer in SCORERS] + [(SCORERS[0], budget) for budget in BUDGETS]
        for scorer, budget in dict.fromkeys(pairs):
            found.append(Copy(copy_name(scorer, budget, profile), scorer, profile, budget))
    return found


class Looked:
    """A picture after its first question: the prefix's keys and values, and what the question's policy keeps."""

    def __init__(self, model: Recorder, seed: int) -> None:
        self.questions = make_picture(seed, SIDE, SIDE, num_questions=QUESTIONS).questions
        model.look_at(make_picture(seed, SIDE, SIDE, num_questions=QUESTIONS))
        self.layers = [torch.stack([seen.keys[0], seen.values[0]], 1) for seen in model.seen]
        """`[prefix, 2, K, D]` each."""
        model.ask([model.tokens(self.questions[0])])
        first = model.seen
        length, heads = first[0].keys.shape[1], first[0].queries.shape[2]
        kv_heads, dim = first[0].keys.shape[2:]
        span = Span(model.span.start, model.span.stop)
        whole = Prompt(length, 0, (span,), model.layers, heads, kv_heads, dim)
        self.prompt = replace(whole, length=span.end)
        policy, budget = resolve(OWN[0]), OWN[1]
        scoring = Scoring(whole, policy.needs)
        for layer, seen in enumerate(first):
            scoring.observe(layer, span.end, seen.queries[0], seen.keys[0], None, None, 1.0)
        views = scoring.views(lambda layer: torch.stack([first[layer].keys[0], first[layer].values[0]], 1))
        plan = policy.decide(*views, whole, budget.target(length, length, model.layers))
        self.own = plan.keep[..., : span.end].any(1)
        """`[layers, prefix]`."""

    def keep(self, copy: Copy, policy: Policy) -> Tensor:
        """`[layers, prefix]`: what a copy has."""
        if copy.scorer is None:
            return self.own
        chosen = copy_policy(policy, self.prompt, self.own, None)
        views = Scoring(self.prompt, chosen.needs).views(self.layers.__getitem__)
        return chosen.decide(*views, self.prompt, copy_total(self.prompt, copy.budget)).keep.any(1)


def readings(
    model: Recorder, looked: Looked, keep: Tensor, weights: tuple[float, ...], lengths: list[int]
) -> dict[str, list[float]]:
    """The guard's reading of each question of the last forward, from different numbers of last rows.

    Args:
        keep: `[layers, prefix]`, their copy.
        weights: per layer, sum 1.
        lengths: rows of each question's prompt.
    """
    totals = {rows: torch.zeros(len(lengths)) for rows in ROWS_READ}
    for layer, weight in enumerate(weights):
        evicted = looked.layers[layer][~keep[layer], 0].transpose(0, 1).contiguous()
        sketch = KeySketch.of(evicted, looked.prompt.length) if weight else None
        if sketch is None:
            continue
        seen = model.seen[layer]
        for number, count in enumerate(lengths):
            mass = sketch.log_mass(seen.queries[number, :count], 1.0)
            shares = missing_share(seen.lse[number, :, :count].T, mass).mean(1)
            for rows, total in totals.items():
                total[number] += weight * shares[-rows:].mean()
    return {str(rows): [round(float(value), 5) for value in total] for rows, total in totals.items()}


def measure(seeds: tuple[int, ...], console: Console) -> list[dict[str, Any]]:
    """One record per picture and copy."""
    model = Recorder()
    chosen = [(copy, resolve(copy.policy)) for copy in copies()]
    for _, policy in chosen:
        require_agnostic(policy)
    records = []
    for seed in track(seeds, "copies", console=console, transient=True):
        looked = Looked(model, seed)
        lengths = [len(model.tokens(question)) for question in looked.questions]
        everything = torch.ones_like(looked.own).expand(len(lengths), -1, -1)
        records.append({"copy": FULL, "seed": seed, "kept": 1.0, "right": model.right(looked.questions, everything)})
        for copy, policy in chosen:
            keep = looked.keep(copy, policy)
            right = model.right(looked.questions, keep.expand(len(lengths), -1, -1))
            weights = layer_weights(policy, looked.prompt, copy.budget)
            kept = float(keep[:, model.span].float().mean())
            record = {"copy": copy.name, "seed": seed, "kept": round(kept, 4), "right": right}
            records.append({**record, "readings": readings(model, looked, keep, weights, lengths)})
    return records


def run(path: Path, host: Mapping[str, Any], quick: bool, console: Console) -> None:
    """Measure and write `path`."""
    records = measure(SEEDS[:2] if quick else SEEDS, console)
    summary = summarise_copies(records)
    if quick:
        for row in summary:
            console.print(row)
        return
    result = {
        "task": "sharing",
        "experiment": "copies",
        "command": "python benchmarks/run.py sharing copies",
        "host": host,
        "model": MODEL,
        "rows_read_by_server": LAST_ROWS,
        "copies": {copy.name: {"policy": copy.policy, "budget": copy.budget} for copy in copies() if copy.scorer},
        "summary": summary,
        "records": records,
    }
    path.write_text(dump(result))
    console.print(f"written: {path.name}")
