"""Methods that kvpress lacks, against their formulas written down naively in float64 numpy.

Everything here starts from queries, keys and values; nothing of the code under test is used but the code under test.
"""

import math

import numpy as np
import pytest

from vlcache_sgl.api import Prompt, Selection
from vlcache_sgl.api.testing import Layer, synthetic_layers, synthetic_prompt, view_layers
from vlcache_sgl.policy import Policy, resolve

ONE = synthetic_prompt(80, [(6, 60)], num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
TWO = synthetic_prompt(90, [(6, 30), (40, 70)], num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
LAST = synthetic_prompt(80, [(6, 80)], num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
HIT = synthetic_prompt(80, [(6, 60)], start=20, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
PROMPTS = pytest.mark.parametrize("prompt", [ONE, TWO, LAST, HIT], ids=["one", "two", "last", "prefix-hit"])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def attention(layer: Layer, prompt: Prompt) -> np.ndarray:
    """`[H, n, n]` float64, row by row; rows before the prefix's end exist here but must not vote."""
    q, k = layer.queries.double().numpy(), layer.keys.double().numpy()
    group = q.shape[0] // k.shape[0]
    out = np.zeros((q.shape[0], prompt.length, prompt.length))
    for head in range(q.shape[0]):
        for row in range(prompt.length):
            out[head, row, : row + 1] = softmax(k[head // group, : row + 1] @ q[head, row] / math.sqrt(q.shape[2]))
    return out


def per_kv_head(x: np.ndarray, prompt: Prompt) -> np.ndarray:
    """Mean over the query heads of a group."""
    return x.reshape(prompt.num_kv_heads, -1, *x.shape[1:]).mean(1)


def query_rows(prompt: Prompt) -> list[int]:
    after = max(end for _, end in prompt.vision)
    rows = [row for row in range(after, prompt.length) if row >= prompt.start]
    return rows or list(range(max(prompt.start, prompt.length - 32), prompt.length))


def vision_mask(prompt: Prompt) -> np.ndarray:
    return np.array([any(b <= p < e for b, e in prompt.vision) for p in range(prompt.start, prompt.length)])


def average(x: np.ndarray, kernel: int) -> np.ndarray:
    padded = np.pad(x, [(0, 0), (kernel // 2, kernel // 2)])
    return np.stack([padded[:, i : i + kernel].sum(1) / kernel for i in range(x.shape[1])], axis=1)


def scored(text: str, prompt: Prompt, layers: list[Layer] | None = None) -> np.ndarray:
    policy = resolve(text)
    views = view_layers(layers or synthetic_layers(prompt), prompt, policy.needs[0])
    return policy.score(views, prompt).numpy()


def allocated(text: str, prompt: Prompt, total: int, layers: list[Layer] | None = None) -> np.ndarray:
    """Counts of the allocator `text` under the scorer `random`."""
    policy = resolve(f"scorer=random,allocator={text}")
    return counts_of(policy, prompt, total, layers)


def counts_of(policy: Policy, prompt: Prompt, total: int, layers: list[Layer] | None = None) -> np.ndarray:
    layers = layers or synthetic_layers(prompt)
    views = (view_layers(layers, prompt, needs) for needs in policy.needs)
    return policy.decide(*views, prompt, total).counts[:, 0].numpy()


def close(ours: np.ndarray, formula: np.ndarray) -> None:
    np.testing.assert_allclose(ours, formula, rtol=2e-4, atol=1e-6)


def shares(weights: np.ndarray, total: int) -> np.ndarray:
    return weights / weights.sum() * total


# -- VL-Cache


@PROMPTS
def test_vlcache_scores(prompt):
    for ours, layer in zip(scored("vlcache:paper", prompt), synthetic_layers(prompt), strict=True):
        votes = per_kv_head(attention(layer, prompt)[:, query_rows(prompt)].sum(1), prompt)
        close(ours, votes[:, prompt.start :])


@PROMPTS
def test_vlcache_scores_are_the_strongest_votes_smoothed(prompt):
    for ours, layer in zip(scored("vlcache", prompt), synthetic_layers(prompt), strict=True):
        votes = attention(layer, prompt)[:, query_rows(prompt)].max(1)
        heads = votes.reshape(prompt.num_kv_heads, -1, prompt.length).max(1)
        padded = np.pad(heads[:, prompt.start :], ((0, 0), (8, 8)))
        close(ours, np.stack([padded[:, i : i + prompt.owned] for i in range(17)]).mean(0))


@PROMPTS
def test_vlcache_budgets(prompt):
    density = []
    for layer in synthetic_layers(prompt):
        kept = visible = 0
        for head in attention(layer, prompt):
            for row in query_rows(prompt):
                kept += int((head[row, : row + 1] >= 0.01 * head[row].max()).sum())
                visible += row + 1
        density.append(kept / visible)
    total = 3 * prompt.owned // 4  # small enough that no bound is reached
    expected = shares(np.array(density), total)
    assert expected.max() < prompt.owned
    assert np.abs(allocated("vlcache", prompt, total) - expected).max() < 1
    clipped = np.clip(np.array(density) / sum(density) * total / prompt.owned, 0.01, 1.0)
    paper = resolve("scorer=random,allocator=vlcache,paper=true")
    assert counts_of(paper, prompt, total).tolist() == np.round(clipped * prompt.owned).tolist()


def test_vlcache_paper_misses_the_budget_where_the_clip_acts_and_ours_does_not():
    """A dense first layer would get more than it has: the paper lets the surplus go, we give it to the others."""
    layers = synthetic_layers(ONE)
    layers[0] = Layer(layers[0].queries * 0, layers[0].keys, layers[0].values)  # uniform attention: density 1
    layers[1:] = [Layer(layer.queries * 100, layer.keys, layer.values) for layer in layers[1:]]
    total = 2 * ONE.owned
    paper = counts_of(resolve("scorer=vlcache,allocator=vlcache,paper=true"), ONE, total, layers)
    assert paper[0] == ONE.owned
    assert paper.sum() < total
    ours = counts_of(resolve("scorer=vlcache,allocator=vlcache"), ONE, total, layers)
    assert ours[0] == ONE.owned
    assert ours.sum() == total
    floored = counts_of(resolve("scorer=vlcache,allocator=vlcache,floor=0.5"), ONE, total // 2, layers)
    assert floored.min() == total // 2 // 3 // 2


def test_vlcache_gives_a_dense_layer_more():
    counts = allocated("vlcache", ONE, 60)
    assert counts[0] > counts[1] > counts[2], "synthetic attention gets sharper with every layer"


# -- scorers


@PROMPTS
@pytest.mark.parametrize("mean", [False, True])
def test_h2o(prompt, mean):
    for ours, layer in zip(scored(f"h2o:mean={mean}", prompt), synthetic_layers(prompt), strict=True):
        votes = per_kv_head(attention(layer, prompt)[:, prompt.start :].sum(1), prompt)[:, prompt.start :]
        close(ours, votes / np.arange(prompt.owned, 0, -1) if mean else votes)


@PROMPTS
def test_lookm(prompt):
    vision = vision_mask(prompt)
    for ours, layer in zip(scored("lookm", prompt), synthetic_layers(prompt), strict=True):
        votes = per_kv_head(attention(layer, prompt)[:, prompt.start :].sum(1), prompt)[:, prompt.start :]
        best_text = votes[:, ~vision].max(1, keepdims=True) if (~vision).any() else 0
        close(ours, votes + np.where(vision, 0, best_text))


@PROMPTS
def test_snapkv_max(prompt):
    before = prompt.owned - 8
    for ours, layer in zip(scored("snapkv:max,window=8", prompt), synthetic_layers(prompt), strict=True):
        votes = per_kv_head(attention(layer, prompt)[:, -8:].mean(1), prompt)[:, prompt.start : prompt.length - 8]
        padded = np.pad(votes, [(0, 0), (3, 3)])
        pooled = np.stack([padded[:, i : i + 7].max(1) for i in range(before)], axis=1)
        close(ours[:, :before], pooled)


@PROMPTS
def test_cake_scores(prompt):
    """The variance runs over the rows of all query heads of a group: the law of total variance, spelled out."""
    window, gamma, before = 8, 200.0, prompt.owned - 8
    for ours, layer in zip(scored("cake:scorer.window=8", prompt), synthetic_layers(prompt), strict=True):
        rows = attention(layer, prompt)[:, -window:, prompt.start : prompt.length - window]
        grouped = rows.reshape(prompt.num_kv_heads, -1, before)  # heads of the group times rows
        mean = grouped.mean(1)
        squares = (grouped**2).sum(1) / (prompt.num_heads / prompt.num_kv_heads)
        variance = (squares - window * mean**2) / (window - 1)
        np.testing.assert_allclose(ours[:, :before], average(mean + gamma * variance, 5), rtol=1e-3, atol=1e-4)


def test_cake_is_the_papers_with_one_query_head_per_kv_head():
    prompt = synthetic_prompt(80, [(6, 60)], num_layers=3, num_heads=2, num_kv_heads=2, head_dim=8)
    weights = []
    for ours, layer in zip(scored("cake:scorer.window=8", prompt), synthetic_layers(prompt), strict=True):
        rows = attention(layer, prompt)[:, -8:]
        columns = rows[:, :, :-8]
        score = columns.mean(1) + 200 * columns.var(1, ddof=1)
        np.testing.assert_allclose(ours[:, :-8], average(score, 5), rtol=1e-3, atol=1e-4)
        entropy = -(rows * np.log(np.maximum(rows, 1e-300))).sum()  # whole rows: a deviation that cake.py names
        weights.append(entropy ** (1 / 1.6) * columns.var(1, ddof=1).sum() ** (1 / 0.4))
    policy = resolve("scorer=random,allocator=cake,window=8,tau1=1.6,tau2=0.4")
    assert np.abs(counts_of(policy, prompt, 90) - shares(np.array(weights), 90)).max() < 1


def at_mean(x: np.ndarray, mean: float) -> np.ndarray:
    x = (x - x.min()) / (x.max() - x.min())
    return x * mean / x.mean()


@PROMPTS
@pytest.mark.parametrize("mix", ["head", "mean"])
def test_mixkv(prompt, mix):
    before = prompt.owned - 8
    for ours, layer in zip(scored(f"mixkv:window=8,mix={mix}", prompt), synthetic_layers(prompt), strict=True):
        votes = per_kv_head(attention(layer, prompt)[:, -8:].mean(1), prompt)[:, prompt.start : prompt.length - 8]
        attn = average(votes, 5)
        for head in range(prompt.num_kv_heads):
            keys = layer.keys[head, prompt.start :].double().numpy()
            unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
            cosines = unit @ unit.T
            redundancy = (cosines.sum() - prompt.owned) / (prompt.owned * (prompt.owned - 1))

            diversity = at_mean(-(unit @ unit.mean(0))[:before], attn[head].mean())
            norms = np.linalg.norm(layer.values[head, prompt.start :].double().numpy(), axis=1)[:before]
            length = at_mean(norms, attn[head].mean())
            weight = min(max(redundancy, 0), 1)
            mixed = weight * diversity + (1 - weight) * (attn[head] + length)
            expected = mixed if mix == "head" else (diversity + length + attn[head]) / 3
            close(ours[head, :before], expected)


@PROMPTS
def test_infinipot_v(prompt):
    vision = vision_mask(prompt)
    for ours, layer in zip(scored("infinipot_v", prompt), synthetic_layers(prompt), strict=True):
        norms = np.linalg.norm(layer.values[:, prompt.start :].double().numpy(), axis=2)
        close(ours[:, vision], norms[:, vision])
        if (~vision).any():
            assert ours[:, ~vision].min() > ours[:, vision].max(initial=0) - 1e-6


def elite_votes(layer: Layer, prompt: Prompt) -> np.ndarray:
    """AirCache by its description, one head, one row at a time; `[m]` over owned tokens, vision ones only."""
    q, k = layer.queries.double().numpy(), layer.keys.double().numpy()
    group, start = q.shape[0] // k.shape[0], prompt.start
    vision = [p for p in range(start, prompt.length) if vision_mask(prompt)[p - start]]
    text = [p for p in range(start, prompt.length) if p not in vision]
    rows = query_rows(prompt)
    text = sorted({*text, *rows})  # without text after the image its last rows ask
    asking = np.zeros(len(text))
    for head in range(q.shape[0]):
        asking += softmax(k[head // group, text] @ q[head, -1] / math.sqrt(q.shape[2])) / q.shape[0]
    strength = {p: asking[text.index(p)] for p in rows}
    elite = [p for p in rows if strength[p] >= 0.9 * max(strength.values())]
    votes = np.zeros(prompt.length)
    for row in elite:
        seen = [p for p in sorted({*vision, *elite}) if p <= row]
        for head in range(q.shape[0]):
            weights = softmax(k[head // group, seen] @ q[head, row] / math.sqrt(q.shape[2]))
            for p, weight in zip(seen, weights, strict=True):
                votes[p] += weight / q.shape[0] / len(elite)
    return votes[start:][vision_mask(prompt)]


@PROMPTS
def test_aircache_scores(prompt):
    for ours, layer in zip(scored("aircache", prompt), synthetic_layers(prompt), strict=True):
        for head in ours:
            close(head[vision_mask(prompt)], elite_votes(layer, prompt))


def test_aircache_budgets():
    votes = np.stack([elite_votes(layer, ONE) for layer in synthetic_layers(ONE)])
    n = votes.shape[1]
    scaled = (votes - votes.mean(1, keepdims=True)) / votes.std(1, ddof=1, keepdims=True)
    skewness = np.maximum(n / ((n - 1) * (n - 2)) * (scaled**3).sum(1), 0)
    strength = votes.sum(1)
    weight = 0.5 * (strength / strength.mean() + skewness / skewness.mean())
    text = int((~vision_mask(ONE)).sum())
    total = 3 * text + 60
    assert np.abs(allocated("aircache", ONE, total) - text - shares(weight, 60)).max() < 1


# -- allocators


@PROMPTS
def test_meda(prompt):
    entropy = []
    for layer in synthetic_layers(prompt):
        rows = attention(layer, prompt)[:, prompt.start :]
        entropy.append(-(rows * np.log(np.maximum(rows, 1e-300))).sum(2).mean())
    total = prompt.owned
    expected = shares(softmax(np.array(entropy)), total)
    assert np.abs(allocated("meda", prompt, total) - expected).max() < 1


def masses(prompt: Prompt) -> np.ndarray:
    """`[L, m]`, accumulated attention of owned tokens by owned rows, mean over heads."""
    layers = synthetic_layers(prompt)
    return np.stack([attention(layer, prompt)[:, prompt.start :, prompt.start :].sum(1).mean(0) for layer in layers])


@PROMPTS
@pytest.mark.parametrize("total", [3, 50, 120])
def test_prefixkv(prompt, total):
    """Bisection over the common share, as in the paper: our counts lie between those just below and just above it."""
    mass = -np.sort(-masses(prompt), axis=1)
    cumulated = np.cumsum(mass / mass.sum(1, keepdims=True), axis=1)

    def needed(share: float) -> np.ndarray:
        return np.minimum((cumulated < share).sum(1) + 1, prompt.owned)

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle).sum() <= total else (low, middle)
    counts = allocated("prefixkv", prompt, total)
    assert counts.sum() == total
    assert (counts >= needed(low - 1e-6) - 1).all()
    assert (counts <= needed(high + 1e-6) + 1).all()


@PROMPTS
@pytest.mark.parametrize("tau", [0.3, 0.6])
def test_zipvl(prompt, tau):
    """Below the budget it keeps what the target takes; the budget is only a bound."""
    mass = masses(prompt) / np.arange(prompt.owned, 0, -1)
    ranked = -np.sort(-mass, axis=1)
    expected = [next(i + 1 for i in range(prompt.owned) if r[: i + 1].sum() >= tau * r.sum() - 1e-9) for r in ranked]
    policy = resolve(f"scorer=random,allocator=zipvl,tau={tau}")
    assert np.abs(counts_of(policy, prompt, 3 * prompt.owned) - expected).max() <= 1  # float32 sums at the threshold
    assert counts_of(policy, prompt, 6).sum() == 6


@PROMPTS
def test_global(prompt):
    scores = scored("vlcache:paper", prompt).mean(1)
    ranked = sorted(((-value, layer) for layer, row in enumerate(scores) for value in row))[:60]
    expected = [sum(layer == winner for _, winner in ranked) for layer in range(3)]
    assert counts_of(resolve("scorer=vlcache,allocator=global"), prompt, 60).tolist() == expected


def test_global_composite():
    scores = -np.sort(-scored("vlcache:paper", ONE), axis=2)  # every head sorted, then the i-th best together
    ranked = sorted(((-value, layer) for layer, row in enumerate(scores.mean(1)) for value in row))[:60]
    expected = [sum(layer == winner for _, winner in ranked) for layer in range(3)]
    policy = resolve("scorer=vlcache,allocator=global,among=composite,heads=split")
    assert counts_of(policy, ONE, 60).tolist() == expected


def test_global_respects_the_floor():
    layers = synthetic_layers(ONE)
    layers[0] = Layer(layers[0].queries * 50, layers[0].keys, layers[0].values)
    policy = resolve("scorer=vlcache,allocator=global,floor=0.4")
    counts = counts_of(policy, ONE, 60, layers)
    assert counts.sum() == 60
    assert counts.min() >= 8


def test_uniform_spreads_the_rest_over_the_lower_layers():
    assert allocated("uniform", ONE, 62).tolist() == [21, 21, 20]


def test_random_is_deterministic_and_seeded():
    first, again, other = (scored(f"random:seed={seed}", ONE) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    assert (first[0] != first[1]).any(), "layers draw their own"


def test_selection_of_recipes_is_the_published_one():
    expected = {
        "h2o": Selection(recent=0.5),
        "streaming": Selection(sink=4),
        "prefixkv": Selection(sink=1, recent=1),
        "aircache": Selection(protect="text"),
        "infinipot_v": Selection(protect="text"),
        "chunkkv": Selection(span=20),
        "vlcache:paper": Selection(recent=0.1),
    }
    assert {name: resolve(name).selection for name in expected} == expected
