"""Copies for everybody without a server: which score, which layers, how much; and readings beside right answers.

The server's code chooses what the first question needs, and the copies; questions then run behind the picture with
everything else of it hidden, as after a hit.  This is how many combinations are looked at in minutes, and scores that
no server makes copies with beside those of servers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.common.results import save
from benchmarks.sharing.recorder import MODEL, Recorder
from benchmarks.sharing.results import (
    ASKERS,
    BOUND,
    BUDGET,
    BUDGETS,
    DECODE,
    FRONTIER,
    FULL,
    OBSERVERS,
    ROWS_READ,
    SCORERS,
    WATCHED,
    copy_name,
    dump,
    summarise_copies,
)
from benchmarks.sharing.scores import GENERIC, any_row, guesses, last_rows, looked_at, over_rows
from vlcache_sgl.api import Prompt, Span
from vlcache_sgl.compression.sharing.guard import FIRST_STEPS, LAST_ROWS
from vlcache_sgl.compression.sharing.sketch import KeySketch, missing_share
from vlcache_sgl.config import KVBudget
from vlcache_sgl.evaluation.tasks.receipts import make_picture
from vlcache_sgl.policy import Policy, resolve
from vlcache_sgl.policy.tier import copy_policy, copy_total, layer_weights, require_agnostic
from vlcache_sgl.scoring.scoring import Scoring

SIDE, QUESTIONS = 24, 8
SEEDS = tuple(seed + i for seed in (60_000, 61_000, 62_000) for i in range(20))
UNGROUNDED = "models/tinyvlm/ungrounded"
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
    def allocator(self) -> str:
        return f"table,file={PROFILE}" if self.profile else "uniform"

    def share_policy(self) -> Policy:
        """The server's share policy; a score that is no plugin's takes the place of its scorer."""
        scorer = self.scorer if self.scorer in (*SCORERS, *OBSERVERS) else SCORERS[0]
        return resolve(f"scorer={scorer},allocator={self.allocator}")


def copies() -> list[Copy]:
    """All that are looked at."""
    found = [Copy("policy", None, False, BUDGET), Copy("policy, profile", None, True, BUDGET)]
    pairs = [(scorer, BUDGET) for scorer in (*SCORERS, *OBSERVERS, *ASKERS, BOUND)]
    pairs += [(scorer, budget) for scorer in FRONTIER for budget in BUDGETS]
    for profile in (False, True):
        for scorer, budget in dict.fromkeys(pairs):
            found.append(Copy(copy_name(scorer, budget, profile), scorer, profile, budget))
    return found


class Looked:
    """A picture after its first question: what the prefix holds, what the question's policy keeps, what others see."""

    def __init__(self, model: Recorder, seed: int) -> None:
        picture = make_picture(seed, SIDE, SIDE, num_questions=QUESTIONS)
        self.questions = picture.questions
        model.look_at(picture)
        self.layers = [torch.stack([seen.keys[0], seen.values[0]], 1) for seen in model.seen]
        """`[prefix, 2, K, D]` each."""
        self._queries = [seen.queries[0] / model.scale for seen in model.seen]
        self._positions, self._scale = model.positions, model.scale
        model.ask([model.tokens(self.questions[0].text)])
        first = model.seen
        length, heads = first[0].keys.shape[1], first[0].queries.shape[2]
        kv_heads, dim = first[0].keys.shape[2:]
        span = Span(model.span.start, model.span.stop)
        whole = Prompt(length, 0, (span,), model.layers, heads, kv_heads, dim, rotary=model.rotary)
        self.prompt = replace(whole, length=span.end)
        policy, budget = resolve(OWN[0]), OWN[1]
        scoring = Scoring(whole, policy.needs)
        for layer, seen in enumerate(first):
            scoring.observe(layer, span.end, seen.queries[0], seen.keys[0], None, None, 1.0)
        views = scoring.views(lambda layer: torch.stack([first[layer].keys[0], first[layer].values[0]], 1))
        plan = policy.decide(*views, whole, budget.target(length, length, model.layers))
        self.own = plan.keep[..., : span.end].any(1)
        """`[layers, prefix]`."""
        asked = guesses(seed)
        self.guessed = [(question.record.colour, question.record.letter) in asked for question in self.questions]
        """Which of the questions are about a label that a made-up one was about."""
        self._told = {
            "describe": looked_at(model, GENERIC, over_rows),
            "asked": looked_at(model, list(asked.values()), any_row),
            BOUND: looked_at(model, [question.text for question in self.questions], last_rows),
        }

    def extra_rows(self, copy: Copy) -> int:
        """Rows that the model computed for a copy's score, in addition to the prefill of the prefix."""
        told = self._told.get(copy.scorer or "")
        return told.rows if told else 0

    def keep(self, copy: Copy, policy: Policy) -> Tensor:
        """`[layers, prefix]`: what a copy has."""
        if copy.scorer is None:
            return self.own
        if copy.scorer in self._told:
            policy = replace(policy, scorer=self._told[copy.scorer], scorer_name=copy.scorer)
        chosen = copy_policy(policy, self.prompt, self.own, None)
        scoring = Scoring(self.prompt, chosen.needs)
        scoring.add_positions(self._positions)
        for layer, queries in enumerate(self._queries):
            scoring.observe(layer, 0, queries, self.layers[layer][:, 0], None, None, self._scale)
        views = scoring.views(self.layers.__getitem__)
        return chosen.decide(*views, scoring.final_prompt(), copy_total(self.prompt, copy.budget)).keep.any(1)


def rows_read(length: int) -> dict[str, slice]:
    """Which rows of a question of `length` tokens and its answer each reading is made of."""
    found = {str(rows): slice(length - rows if rows else 0, length) for rows in ROWS_READ}
    return {**found, DECODE: slice(length, length + FIRST_STEPS)}


def readings(
    model: Recorder, looked: Looked, keep: Tensor, weights: tuple[float, ...], lengths: list[int]
) -> dict[str, list[float]]:
    """The guard's readings of each question of the last forward, which went on with its right answer.

    Args:
        keep: `[layers, prefix]`, their copy.
        weights: per layer, sum 1.
        lengths: rows of each question's prompt.
    """
    slices = [rows_read(length) for length in lengths]
    totals = {name: torch.zeros(len(lengths)) for name in slices[0]}
    for layer, weight in enumerate(weights):
        evicted = looked.layers[layer][~keep[layer], 0].transpose(0, 1).contiguous()
        sketch = KeySketch.of(evicted, looked.prompt.length) if weight else None
        if sketch is None:
            continue
        seen = model.seen[layer]
        for number, parts in enumerate(slices):
            mass = sketch.log_mass(seen.queries[number], 1.0)
            shares = missing_share(seen.lse[number].T, mass).mean(1)
            for name, part in parts.items():
                totals[name][number] += weight * shares[part].mean()
    return {name: [round(float(value), 5) for value in total] for name, total in totals.items()}


def measure(name: str, ways: Sequence[Copy], seeds: Sequence[int], console: Console) -> list[dict[str, Any]]:
    """One record per picture and copy, with readings where a table of the guard wants them.

    Args:
        name: the model.
        ways: to choose what stays.
    """
    model = Recorder(name)
    chosen = [(copy, copy.share_policy()) for copy in ways]
    for copy, policy in chosen:
        if copy.scorer not in OBSERVERS:
            require_agnostic(policy)
    watched = {name for names in WATCHED.values() for name in names}
    records = []
    for seed in track(seeds, "copies", console=console, transient=True):
        looked = Looked(model, seed)
        lengths = [len(model.tokens(question.text)) for question in looked.questions]
        everything = torch.ones_like(looked.own).expand(len(lengths), -1, -1)
        full = {"copy": FULL, "seed": seed, "kept": 1.0, "extra_rows": 0}
        right = model.right(looked.questions, everything)
        records.append({**full, "right": right, "guessed": looked.guessed})
        for copy, policy in chosen:
            keep = looked.keep(copy, policy)
            right = model.right(looked.questions, keep.expand(len(lengths), -1, -1))
            kept = round(float(keep[:, model.span].float().mean()), 4)
            record: dict[str, Any] = {"copy": copy.name, "seed": seed, "kept": kept}
            record |= {"extra_rows": looked.extra_rows(copy), "right": right}
            if copy.name in watched:
                weights = layer_weights(policy, looked.prompt, copy.budget)
                record["readings"] = readings(model, looked, keep, weights, lengths)
            records.append(record)
    return records


def run(path: Path, host: Mapping[str, Any], quick: bool, console: Console) -> None:
    """Measure and write `path`."""
    _run(path, "copies", MODEL, copies(), SEEDS[:2] if quick else SEEDS, host, quick, console)


def run_late(path: Path, host: Mapping[str, Any], quick: bool, console: Console) -> None:
    """The readings of a model that looks things up while it answers; it has no profile."""
    watched = [copy for copy in copies() if copy.name in WATCHED["no profile"]]
    _run(path, "late", UNGROUNDED, watched, SEEDS[20:22] if quick else SEEDS[20:], host, quick, console)


def _run(
    path: Path,
    name: str,
    model: str,
    ways: Sequence[Copy],
    seeds: Sequence[int],
    host: Mapping[str, Any],
    quick: bool,
    console: Console,
) -> None:
    records = measure(model, ways, seeds, console)
    summary = summarise_copies(records)
    if quick:
        for row in summary:
            console.print(row)
        return
    result = {
        "task": "sharing",
        "experiment": name,
        "command": f"python benchmarks/run.py sharing {name}",
        "host": host,
        "model": model,
        "rows_read_by_server": LAST_ROWS,
        "decode_steps_read_by_server": FIRST_STEPS,
        "copies": {
            copy.name: {"scorer": copy.scorer, "allocator": copy.allocator, "budget": copy.budget}
            for copy in ways
            if copy.scorer
        },
        "summary": summary,
        "records": records,
    }
    save(path, result, dump(result))
    console.print(f"written: {path.name}")
