"""Recall in the judge: all of it is the full cache, each rule ranks as it says, and nothing kept is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from benchmarks.judge.cases import CaseMaker
from benchmarks.judge.network import Network, Past, States
from benchmarks.judge.recalling import Recalling, Rule, Sketch, SketchName, layer_sketches

PROMPT, ANSWER = 50, 6
Found = dict[str, list[Sketch]]
TOKENS = tuple(torch.randint(0, 256, (PROMPT + ANSWER,), generator=torch.Generator().manual_seed(1)).tolist())


@pytest.fixture(scope="module")
def network(checkpoint: Path) -> Network:
    return Network(checkpoint)


@pytest.fixture(scope="module")
def states(network: Network) -> States:
    return network.read(TOKENS[:PROMPT])[1]


@pytest.fixture(scope="module")
def sketches(network: Network, checkpoint: Path) -> dict[str, list[Sketch]]:
    cases = CaseMaker(checkpoint)
    return {name: layer_sketches(name, network, cases) for name in get_args(SketchName)}


def kept(share: float, conditions: int = 2) -> torch.Tensor:
    return torch.rand(3, conditions, 2, PROMPT, generator=torch.Generator().manual_seed(2)) < share


RULES = [Rule(0), Rule(0, among="head"), Rule(0, rank="peak"), Rule(0, rank="mass")]
RULES += [Rule(0, rank="mass", beside=beside) for beside in ("kept", "prompt")]
RULES += [Rule(0, sketch=sketch) for sketch in ("keys", "signs", "text")]
RULES += [Rule(0, among="head", rank="mass")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("share", [0.2, 0.0])
def test_recall_of_all_tokens_is_the_full_cache(
    network: Network, states: States, sketches: Found, rule: Rule, share: float
) -> None:
    everything = torch.ones(3, 1, 2, PROMPT, dtype=torch.bool)
    full = network.follow(TOKENS[PROMPT:], Past(states, everything))
    keep = kept(share)
    recall = Recalling(states, keep, rule, [PROMPT, PROMPT], sketches[rule.sketch])
    recalled = network.follow(TOKENS[PROMPT:], Past(states, keep), recall)
    torch.testing.assert_close(recalled, full.expand_as(recalled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_recall_of_no_token_is_the_kept_set(network: Network, states: States, sketches: Found, rule: Rule) -> None:
    keep = kept(0.3)
    alone = network.follow(TOKENS[PROMPT:], Past(states, keep))
    assert torch.equal(
        network.follow(
            TOKENS[PROMPT:], Past(states, keep), Recalling(states, keep, rule, [0, 0], sketches[rule.sketch])
        ),
        alone,
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_what_comes_back_is_evicted_and_ranked(states: States, sketches: Found, rule: Rule) -> None:
    """Against the plain way, row by row, from the sketch's own logits."""
    keep = kept(0.3)
    recalling = Recalling(states, keep, rule, [3, 7], sketches[rule.sketch])
    rows = torch.randn(2, 2, 3, 4, 16, generator=torch.Generator().manual_seed(3))  # [K, C, g, t, D]
    found = recalling(1, rows).seen
    for condition, count in enumerate([3, 7]):
        mine = keep[1, condition]  # [K, n]
        for row in range(4):
            exact = torch.einsum("kgd,knd->kgn", rows[:, condition, :, row], states.keys[1])
            logits = exact if rule.sketch == "keys" else recalling._logits(1, rows)[:, condition, :, row]
            joint = {
                "prompt": logits,
                "kept": torch.where(mine[:, None], exact, logits),
                "evicted": logits.masked_fill(mine[:, None], -torch.inf),
            }[rule.beside]
            worth = logits if rule.rank == "logit" else joint.softmax(-1)
            worth = worth.masked_fill(mine[:, None], 0.0 if rule.rank == "mass" else -torch.inf)
            worth = worth.sum(1) if rule.rank == "mass" else worth.amax(1)  # [K, n]
            evicted = ~mine
            if rule.among == "layer":
                worth = (worth.sum(0) if rule.rank == "mass" else worth.amax(0))[None]
                evicted = evicted.any(0, keepdim=True)
            for group in range(len(worth)):
                best = worth[group].masked_fill(~evicted[group], -torch.inf).topk(count).indices
                assert sorted(best.tolist()) == found[group, condition, row].nonzero().flatten().tolist()
                assert bool(evicted[group, best].all())


def test_a_layer_that_misses_less_than_the_threshold_fetches_nothing(states: States, sketches: Found) -> None:
    keep = kept(0.3)
    rows = torch.randn(2, 2, 3, 4, 16, generator=torch.Generator().manual_seed(3))
    shares = Recalling(states, keep, Rule(0, beside="prompt"), [5, 5], sketches["signs"])._logits(0, rows).softmax(-1)
    missing = shares.masked_fill(keep[0].transpose(0, 1)[:, :, None, None], 0).sum(-1).mean((0, 2))  # [C, t]
    threshold = float(missing.median())
    recalling = Recalling(states, keep, Rule(0, beside="prompt", threshold=threshold), [5, 5], sketches["signs"])
    found = recalling(0, rows).seen
    assert torch.equal(found.any(-1).any(0), missing >= threshold)
    assert torch.equal(recalling.fetched, (missing >= threshold).float().mean(-1))
    assert 0 < float(recalling.fetched.mean()) < 1


def test_the_rest_counts_with_its_mass_and_mean_value(network: Network, states: States, sketches: Found) -> None:
    """By the keys themselves, with one value for all tokens, any recall is the full cache."""
    same = States(
        states.queries, states.keys, states.values.mean(2, keepdim=True).expand_as(states.values).contiguous()
    )
    everything = torch.ones(3, 1, 2, PROMPT, dtype=torch.bool)
    full = network.follow(TOKENS[PROMPT:], Past(same, everything))
    keep = kept(0.3)
    rule = Rule(0, sketch="keys", rest=True)
    recall = Recalling(same, keep, rule, [0, 9], sketches["keys"])
    found = network.follow(TOKENS[PROMPT:], Past(same, keep), recall)
    torch.testing.assert_close(found, full.expand_as(found), rtol=1e-4, atol=1e-4)
    without = Recalling(same, keep, Rule(0, sketch="keys"), [0, 9], sketches["keys"])
    assert not torch.allclose(network.follow(TOKENS[PROMPT:], Past(same, keep), without), full, rtol=1e-2, atol=1e-2)
