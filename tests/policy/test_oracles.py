"""Our scores against kvpress, recorded by ``tests/oracles/record_kvpress.py``.

Where a method differs on purpose, the test says how and compares the rest.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from vlcache_policies import compactor
from vlcache_sgl.api import LayerView, Prompt
from vlcache_sgl.api.testing import Layer, PlainRotary, synthetic_prompt, view_layers
from vlcache_sgl.policy import Policy, resolve
from vlcache_sgl.policy.plan import EvictionPlan

RECORDED = np.load(Path(__file__).parents[1] / "oracles" / "kvpress.npz")
HEADS, TOKENS, DIM = RECORDED["q_pre"].shape
KV_HEADS = RECORDED["k_pre"].shape[0]


def recorded(name: str) -> torch.Tensor:
    return torch.from_numpy(RECORDED[name])


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    return synthetic_prompt(TOKENS, [(10, 200)], num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)


@pytest.fixture(scope="module")
def layer() -> Layer:
    positions = torch.arange(TOKENS)
    turned = [PlainRotary().rotate(recorded(name).float(), positions) for name in ("q_pre", "k_pre")]
    return Layer(*turned, recorded("values").float())


def scored(text: str, layer: Layer, prompt: Prompt) -> torch.Tensor:
    policy = resolve(text)
    return policy.score(view_layers([layer], prompt, policy.needs[0]), prompt)[0]


def decided(text: str, layer: Layer, prompt: Prompt, total: int) -> EvictionPlan:
    policy: Policy = resolve(text)
    views = [view_layers([layer], prompt, needs) for needs in policy.needs]
    return policy.decide(*views, prompt, total)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-6)


def test_our_rotary_is_that_of_transformers(layer):
    close(layer.keys[:, -1], recorded("rotated_keys"))


def test_snapkv(layer, prompt):
    """The window: they give all of it one value, we let later tokens rank higher; both are above everything else."""
    ours, theirs = scored("snapkv:window=32,kernel=5", layer, prompt), recorded("snapkv")
    close(ours[:, :-32], theirs[:, :-32])
    assert bool((ours[:, -32:] > ours[:, :-32].amax(-1, keepdim=True)).all())


def test_tova(layer, prompt):
    ours, theirs = scored("tova", layer, prompt), recorded("tova")
    close(ours[:, :-1], theirs[:, :-1])
    assert bool((ours[:, -1:] > ours[:, :-1]).all())


def test_knorm(layer, prompt):
    close(scored("knorm", layer, prompt), recorded("knorm"))


def test_keydiff(layer, prompt):
    close(scored("keydiff", layer, prompt), recorded("keydiff"))


def test_lagkv(layer, prompt):
    """What always stays has the value 1 there; here it is above every rank, sinks and tail ordered."""
    ours, theirs = scored("lagkv", layer, prompt), recorded("lagkv")
    inside = slice(4, 4 + 128)
    close(ours[:, inside], theirs[:, inside])
    assert bool((theirs[:, :4] == 1).all())
    assert bool((theirs[:, 132:] == 1).all())
    assert float(ours[:, :4].min()) > 1
    assert float(ours[:, 132:].min()) > 1


def test_expected_attention(layer, prompt):
    """All rows, as they have it; the default takes the moments from the last 512 rows."""
    ours, theirs = scored("expected_attention:rows=0", layer, prompt), recorded("expected_attention")
    close(ours[:, 4:], theirs[:, 4:])
    assert bool((ours[:, :4] > ours[:, 4:].amax(-1, keepdim=True)).all())
    plain = "expected_attention:rows=512,covariance=false,scorer.values=false"
    close(scored(plain, layer, prompt)[:, 4:], recorded("expected_attention_mean_only")[:, 4:])


def test_h2o_mean(layer, prompt):
    """kvpress divides by the rows that can see a token; the paper, and our default, do not."""
    close(scored("h2o:mean", layer, prompt), recorded("observed_attention"))
    visible = torch.arange(TOKENS, 0, -1)
    close(scored("h2o", layer, prompt) / visible, recorded("observed_attention"))


@pytest.fixture
def their_sketch(monkeypatch):
    monkeypatch.setattr(compactor, "gaussian_sketch", lambda *_: recorded("sketch") / 48**0.5)


def test_leverage(layer, prompt, their_sketch):
    """One sketch for all heads (theirs draws one per head; the recording gives both the same)."""
    close(scored("scorer=leverage,allocator=uniform", layer, prompt), recorded("leverage"))


def test_look_ahead(layer):
    """Without the factor 1 / sqrt(D); whole chunks only, because their padding of the last one has weight."""
    theirs = recorded("look_ahead").unflatten(0, (KV_HEADS, -1)).mean(1)
    close(compactor.look_ahead(layer.queries[:, :256], layer.keys[:, :256], chunk=128, scale=1.0), theirs)


def test_compactor(layer, prompt, their_sketch):
    ours, theirs = scored("compactor", layer, prompt), recorded("compactor")
    torch.testing.assert_close(ours[:, 8:-4], theirs[:, 8:-4], rtol=1e-3, atol=1e-3)
    ends = torch.cat([ours[:, :8], ours[:, -4:]], dim=-1)
    assert bool((ends > ours[:, 8:-4].amax(-1, keepdim=True)).all())


def test_streaming(layer, prompt):
    theirs = recorded("streaming_kept")
    plan = decided("streaming", layer, prompt, theirs.shape[1])
    assert plan.keep[0, 0].nonzero().flatten().tolist() == theirs[0].tolist()


def test_chunkkv(layer, prompt):
    """With room for the same whole runs; with other budgets we cut the last run where they drop it."""
    theirs = recorded("chunkkv_kept")
    plan = decided("chunkkv", layer, prompt, theirs.shape[1])
    assert plan.keep[0, 0].nonzero().flatten().tolist() == theirs[0].tolist()


def test_pyramid():
    """The same line; we round so that the sum is the budget, they round every layer for itself."""
    theirs = recorded("pyramid_tokens")
    deep = synthetic_prompt(1000, num_layers=len(theirs))
    policy = resolve("scorer=random,allocator=pyramid")
    views = [LayerView(index) for index in range(len(theirs))]
    plan = policy.decide(views, views, deep, total=250 * len(theirs))
    assert int((plan.counts[:, 0] - theirs).abs().max()) <= 1
    assert plan.total == 250 * len(theirs)
