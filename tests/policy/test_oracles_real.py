"""Our kept sets against those of kvpress on a layer of a real model, recorded by
``tests/oracles/record_kvpress_smollm2.py``: real keys have directions and outliers that random ones lack.

kvpress keeps a set per KV head, and so do ours here.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from vlcache_policies import compactor
from vlcache_sgl.api import Prompt
from vlcache_sgl.api.testing import Layer, PlainRotary, view_layers
from vlcache_sgl.policy import resolve

ORACLES = Path(__file__).parents[1] / "oracles"
RECORDED = np.load(ORACLES / "kvpress_smollm2.npz")
HEADS, TOKENS, DIM = RECORDED["q_pre"].shape
KV_HEADS = RECORDED["k_pre"].shape[0]
ROTARY = PlainRotary(theta=float(RECORDED["theta"]))
TWINS = {
    "keydiff": "keydiff:allocator=uniform,heads=split",
    "snapkv": "snapkv:allocator=uniform,window=64,heads=split",
    "expected_attention": "expected_attention:allocator=uniform,rows=0,heads=split",
    "observed_attention": "h2o:allocator=uniform,mean=true,recent=0,heads=split",
    "streaming_llm": "streaming:allocator=uniform,heads=split",
    "tova": "tova:allocator=uniform,heads=split",
    "knorm": "knorm:allocator=uniform,heads=split",
    "compactor": "compactor:allocator=uniform,chunk=58,heads=split",
}
WINDOW = 64
SHARES = (0.5, 0.3, 0.1)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("press", TWINS)
def test_the_same_tokens_stay(press: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sketch = torch.from_numpy(np.load(ORACLES / "kvpress.npz")["sketch"])
    monkeypatch.setattr(compactor, "gaussian_sketch", lambda dim, count, _: sketch / count**0.5)
    positions = torch.arange(TOKENS)
    q_pre, k_pre, values = (torch.from_numpy(RECORDED[name]).float() for name in ("q_pre", "k_pre", "values"))
    layer = Layer(ROTARY.rotate(q_pre, positions), ROTARY.rotate(k_pre, positions), values)
    prompt = Prompt(TOKENS, 0, (), 1, HEADS, KV_HEADS, DIM, rotary=ROTARY, positions=positions)
    policy = resolve(TWINS[press])
    recorded = torch.from_numpy(RECORDED[f"{press}@{share}"]).long()
    views = (view_layers([layer], prompt, needs) for needs in policy.needs)
    plan = policy.decide(*views, prompt, total=recorded.shape[1])
    theirs = torch.zeros(KV_HEADS, TOKENS, dtype=torch.bool).scatter_(1, recorded, True)
    ours = plan.keep[0].expand(KV_HEADS, -1)
    if press == "snapkv" and recorded.shape[1] < WINDOW:
        # They give the window one value, so that which of it stays is chance; ours are the latest.
        assert not bool((ours | theirs)[:, :-WINDOW].any())
        assert bool(ours[:, -recorded.shape[1] :].all())
    elif press == "compactor" and share == 0.1:
        # Room for the ends alone.  They give the ends the value of the best token, which may then take a place of one.
        assert bool(torch.cat([ours[:, :8], ours[:, -4:]], dim=1).all())
        assert int((ours & ~theirs).sum()) <= 1
    else:
        assert torch.equal(ours, theirs)
