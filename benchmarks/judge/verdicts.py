"""Whether the right answer still follows: its tokens run over what each condition kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vlcache_sgl.policy.policy import Policy
from vlcache_sgl.weights import ModelWeights

from .cases import Asked, Case, CaseId, CaseMaker
from .conditions import FULL, Condition
from .decisions import Decisions, Kept
from .network import Network, Past, States

ROWS = 256
"""Token rows of one batch: beyond that matrix products gain nothing and a batch's logits leave the caches."""


class Verdict(NamedTuple):
    """How one condition did with one question."""

    right: bool
    """Greedy decoding gives the right answer."""
    log_probability: float
    """Of the right answer, in nats, its tokens given one after the other."""
    kept: float
    """Kept cells of those that could go, in [0, 1]."""


class Judge:
    """Answers cases with one checkpoint.

    Args:
        folder: of the checkpoint.
        weights: what its layers and heads need, as `--kv-weights` would say; None: not known.
    """

    def __init__(self, folder: Path, weights: ModelWeights | None = None) -> None:
        self.network = Network(folder)
        self.cases = CaseMaker(folder)
        self.weights = weights

    def verdicts(
        self, name: CaseId, conditions: Sequence[Condition], policies: Mapping[str, Policy]
    ) -> dict[str, Verdict | None]:
        """By condition; None for a later question about a text that has only one.

        Args:
            policies: what the conditions' policies are, by their text.
        """
        case = self.cases.make(name)
        hidden, states = self.network.read(case.first.prompt)
        kept = self._decide(case, states, conditions, policies)
        found: dict[str, Verdict | None] = {condition.name: None for condition in conditions}
        first = [condition for condition in conditions if condition.turn == "first"]
        choices = [kept[condition.medium, condition.policy, condition.budget] for condition in first]
        found |= zip((c.name for c in first), self.first(case.first, hidden[-1], states, choices), strict=True)
        if case.later is not None:
            later = [condition for condition in conditions if condition.turn == "later"]
            choices = [kept[condition.medium, condition.policy, condition.budget] for condition in later]
            found |= zip((c.name for c in later), self.later(case.first, case.later, states, choices), strict=True)
        return found

    def _decide(
        self, case: Case, states: States, conditions: Sequence[Condition], policies: Mapping[str, Policy]
    ) -> dict[tuple[str, str, float], Kept]:
        """What is kept, by medium, policy and budget."""
        asked = case.first
        everything = torch.ones(*states.keys.shape[:3], dtype=torch.bool)
        media = {
            medium: Decisions(
                self.network, asked.prompt, states, asked.lines, medium, self.cases.instruction, self.weights
            )
            for medium in {condition.medium for condition in conditions}
        }
        found: dict[tuple[str, str, float], Kept] = {}
        for condition in conditions:
            key = (condition.medium, condition.policy, condition.budget)
            if condition.policy == FULL:
                found[key] = Kept(everything, 1.0, states.length)
            elif key not in found:
                found[key] = media[condition.medium].keep(policies[condition.policy], condition.budget)
        return found

    def first(self, asked: Asked, hidden: torch.Tensor, states: States, choices: Sequence[Kept]) -> list[Verdict]:
        """Where the whole prompt was computed over everything the first token is the prefill's; the others, and all
        after a prefix that was compressed before the rest was computed, see what was kept.

        Args:
            hidden: `[hidden]`, behind the prompt's last token.
            states: of the prompt.
        """
        begin = self.network.log_probabilities(hidden)
        right, gained = int(begin.argmax()) == asked.answer[0], float(begin[asked.answer[0]])

        def run(end: int, mine: Sequence[Kept]) -> list[Verdict]:
            if end < states.length:
                return self._follow(states.first(end), mine, (*asked.prompt[end:], *asked.answer[:-1]), asked.answer)
            rest = self._follow(states, mine, asked.answer[:-1], asked.answer[1:])
            return [Verdict(right and v.right, gained + v.log_probability, v.kept) for v in rest]

        return _by_end(choices, run)

    def later(self, first: Asked, later: Asked, states: States, choices: Sequence[Kept]) -> list[Verdict]:
        """The prefix cache serves the tokens that both prompts begin with; the others see what was kept of those.

        Args:
            states: of the first prompt.
        """
        same = [ours == theirs for ours, theirs in zip(first.prompt, later.prompt, strict=False)]
        shared = same.index(False)

        def run(end: int, mine: Sequence[Kept]) -> list[Verdict]:
            common = min(end, shared)
            rest = (*later.prompt[common:], *later.answer[:-1])
            return self._follow(states.first(common), mine, rest, later.answer)

        return _by_end(choices, run)

    def _follow(
        self, states: States, choices: Sequence[Kept], tokens: Sequence[int], answer: Sequence[int]
    ) -> list[Verdict]:
        """`tokens` over what was kept of `states`; the last of them predict `answer`.  Equal choices are run once."""
        left = [kept.cells[..., : states.length] for kept in choices]
        kinds = [cells.numpy().tobytes() for cells in left]
        alone = list(dict(zip(kinds, left, strict=True)).items())
        found: dict[bytes, tuple[bool, float]] = {}
        step = max(1, ROWS // len(tokens))
        wanted = torch.tensor(answer)
        for begin in range(0, len(alone), step):
            batch, cells = zip(*alone[begin : begin + step], strict=True)
            hidden = self.network.follow(tokens, Past(states, torch.stack(cells, dim=1)))
            log = self.network.log_probabilities(hidden[:, -len(answer) :])
            right = (log.argmax(-1) == wanted).all(-1).tolist()
            gained = log.gather(-1, wanted.expand(len(batch), -1)[..., None]).sum((1, 2)).tolist()
            if not all(map(math.isfinite, gained)):
                raise ArithmeticError("a log-probability is not finite")
            found |= zip(batch, zip(right, gained, strict=True), strict=True)
        return [Verdict(*found[kind], kept.share) for kind, kept in zip(kinds, choices, strict=True)]


def _by_end(choices: Sequence[Kept], run: Callable[[int, list[Kept]], list[Verdict]]) -> list[Verdict]:
    """Verdicts in the order of `choices`, those with the same end in one call of `run`."""
    found: dict[int, Iterator[Verdict]] = {}
    for end in {kept.end for kept in choices}:
        found[end] = iter(run(end, [kept for kept in choices if kept.end == end]))
    return [next(found[kept.end]) for kept in choices]
