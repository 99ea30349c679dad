"""Recall in the judge: all of it is the full cache, each rule ranks as it says, and nothing kept is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.judge.network import Network, Past, States
from benchmarks.judge.recalling import Recalling, Rule

PROMPT, ANSWER = 50, 6
TOKENS = tuple(torch.randint(0, 256, (PROMPT + ANSWER,), generator=torch.Generator().manual_seed(1)).tolist())


@pytest.fixture(scope="module")
def network(checkpoint: Path) -> Network:
    return Network(checkpoint)


@pytest.fixture(scope="module")
def states(network: Network) -> States:
    return network.read(TOKENS[:PROMPT])[1]


def kept(share: float, conditions: int = 2) -> torch.Tensor:
    return torch.rand(3, conditions, 2, PROMPT, generator=torch.Generator().manual_seed(2)) < share


RULES = [Rule(0), Rule(0, among="head"), Rule(0, rank="peak"), Rule(0, rank="logit"), Rule(0, beside="kept")]
RULES += [Rule(0, beside="evicted"), Rule(0, exact=True), Rule(0, among="head", rank="logit")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("share", [0.2, 0.0])
def test_recall_of_all_tokens_is_the_full_cache(network: Network, states: States, rule: Rule, share: float) -> None:
    everything = torch.ones(3, 1, 2, PROMPT, dtype=torch.bool)
    full = network.follow(TOKENS[PROMPT:], Past(states, everything))
    keep = kept(share)
    recalled = network.follow(TOKENS[PROMPT:], Past(states, keep), Recalling(states, keep, rule, [PROMPT, PROMPT]))
    torch.testing.assert_close(recalled, full.expand_as(recalled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_recall_of_no_token_is_the_kept_set(network: Network, states: States, rule: Rule) -> None:
    keep = kept(0.3)
    alone = network.follow(TOKENS[PROMPT:], Past(states, keep))
    assert torch.equal(
        network.follow(TOKENS[PROMPT:], Past(states, keep), Recalling(states, keep, rule, [0, 0])), alone
    )


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.beside != "evicted"], ids=lambda rule: rule.name)
def test_what_comes_back_is_evicted_and_ranked(states: States, rule: Rule) -> None:
    """Against the plain way, row by row, from the sketch's own logits."""
    keep = kept(0.3)
    recalling = Recalling(states, keep, rule, [3, 7])
    rows = torch.randn(2, 2, 3, 4, 16, generator=torch.Generator().manual_seed(3))  # [K, C, g, t, D]
    found = recalling(1, rows)
    for condition, count in enumerate([3, 7]):
        mine = keep[1, condition]  # [K, n]
        for row in range(4):
            exact = torch.einsum("kgd,knd->kgn", rows[:, condition, :, row], states.keys[1])
            logits = exact if rule.exact else recalling._logits(1, rows)[:, condition, :, row]
            joint = torch.where(mine[:, None], exact, logits) if rule.beside == "kept" else logits
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


def test_a_layer_that_misses_less_than_the_threshold_fetches_nothing(states: States) -> None:
    keep = kept(0.3)
    rows = torch.randn(2, 2, 3, 4, 16, generator=torch.Generator().manual_seed(3))
    shares = Recalling(states, keep, Rule(0), [5, 5])._logits(0, rows).softmax(-1)
    missing = shares.masked_fill(keep[0].transpose(0, 1)[:, :, None, None], 0).sum(-1).amax((0, 2))  # [C, t]
    threshold = float(missing.median())
    recalling = Recalling(states, keep, Rule(0, threshold=threshold), [5, 5])
    found = recalling(0, rows)
    assert torch.equal(found.any(-1).any(0), missing >= threshold)
    assert torch.equal(recalling.fetched, (missing >= threshold).float().mean(-1))
    assert 0 < float(recalling.fetched.mean()) < 1
