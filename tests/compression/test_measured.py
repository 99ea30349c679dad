"""What a decision would have caught of a full cache's attention, against float64 written out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vlcache_sgl.api import Prompt, Span
from vlcache_sgl.compression.measured import Measured, Share, share
from vlcache_sgl.config import config_from
from vlcache_sgl.sglang_hooks.session import Session

HEADS, KV_HEADS, DIM, LENGTH = 6, 2, 8, 40
SCALE = DIM**-0.5
PROMPT = Prompt(LENGTH, 0, (Span(4, 30),), 2, HEADS, KV_HEADS, DIM)


def step(seed: int, answered: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries `[H, D]` and keys `[n + t, K, D]`."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(HEADS, DIM, generator=generator) * 3
    return queries, torch.randn(LENGTH + answered, KV_HEADS, DIM, generator=generator)


def reference(queries: torch.Tensor, keys: torch.Tensor, kept: torch.Tensor) -> Share:
    """Head by head, with Python's own sets and sums."""
    rows = []
    for head in range(HEADS):
        logits = (keys[:, head // (HEADS // KV_HEADS)].double() @ queries[head].double()) * SCALE
        rows.append((logits - logits.max()).exp() / (logits - logits.max()).exp().sum())
    groups = [rows[i * HEADS // len(kept) : (i + 1) * HEADS // len(kept)] for i in range(len(kept))]
    mass, hits = [], []
    for mine, own in zip(kept.tolist(), groups, strict=True):
        row = (sum(own) / len(own)).tolist()
        here = {position for position in range(LENGTH) if mine[position]}
        mass.append(sum(row[position] for position in range(len(row)) if position in here or position >= LENGTH))
        best = sorted(range(LENGTH), key=lambda position: (-row[position], position))[: len(here)]
        hits.append(len(here & set(best)) / len(here))
    return Share(sum(mass) / len(mass), sum(hits) / len(hits))


@pytest.mark.parametrize("groups", [1, KV_HEADS])
@pytest.mark.parametrize("seed", range(6))
def test_share_is_that_of_the_reference(groups: int, seed: int) -> None:
    queries, keys = step(seed)
    kept = torch.rand(groups, LENGTH, generator=torch.Generator().manual_seed(seed)) < 0.3
    got, expected = share(queries, keys, kept, SCALE), reference(queries, keys, kept)
    assert got.mass == pytest.approx(expected.mass, abs=1e-6)
    assert got.hits == pytest.approx(expected.hits, abs=1e-6)


def test_the_references_are_of_use() -> None:
    """They are no constant."""
    kept = torch.arange(LENGTH)[None] % 3 == 0
    hits = {reference(*step(seed), kept).hits for seed in range(6)}
    assert len(hits) > 1
    assert all(0 < hit < 1 for hit in hits)


def test_bounds() -> None:
    queries, keys = step(0)
    everything = torch.ones(1, LENGTH, dtype=torch.bool)
    whole = share(queries, keys, everything, SCALE)
    assert whole == pytest.approx(Share(1.0, 1.0))
    nothing = share(queries, keys, ~everything, SCALE)
    assert nothing.hits == 0
    assert nothing.mass == pytest.approx(
        reference(queries, keys, everything).mass - _on_prompt(queries, keys), abs=1e-6
    )


def _on_prompt(queries: torch.Tensor, keys: torch.Tensor) -> float:
    by_head = keys.double().repeat_interleave(HEADS // KV_HEADS, 1)
    row = torch.einsum("hd,nhd->hn", queries.double(), by_head).mul(SCALE).softmax(-1)
    return float(row[:, :LENGTH].sum(-1).mean())


def test_a_report_is_the_mean_of_the_steps_that_answered() -> None:
    """Three tokens are the prefill's and two steps; a step that ran ahead of the answer's end does not count."""
    keep = torch.rand(2, 1, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.4
    measured = Measured(keep, PROMPT)
    assert measured.report(1) == {"steps": 0, "attention_mass": [], "cache_hit_rate": []}
    expected = []
    for answered in (1, 2, 3):
        for layer in range(2):
            queries, keys = step(10 * answered + layer, answered)
            measured.observe(layer, queries, keys, SCALE)
            expected.append(reference(queries, keys, keep[layer]))
    report = measured.report(3)
    assert report["steps"] == 2
    for layer in range(2):
        first, second = expected[layer], expected[2 + layer]
        assert report["attention_mass"][layer] == pytest.approx((first.mass + second.mass) / 2, abs=1e-4)
        assert report["cache_hit_rate"][layer] == pytest.approx((first.hits + second.hits) / 2, abs=1e-4)
    assert measured.report(4)["steps"] == 3


def test_what_came_from_the_prefix_cache_counts_as_kept() -> None:
    own = torch.zeros(1, 1, LENGTH - 10, dtype=torch.bool)
    measured = Measured(own, replace(PROMPT, start=10))
    queries, keys = step(3, 1)
    measured.observe(0, queries, keys, SCALE)
    kept = torch.arange(LENGTH)[None] < 10
    assert measured.report(2)["attention_mass"] == [pytest.approx(reference(queries, keys, kept).mass, abs=1e-4)]


@pytest.mark.parametrize(
    ("on_device", "ranks", "message"),
    [(True, 1, "--attention-backend torch_native"), (False, 2, "tensor parallel"), (False, 1, None)],
)
def test_servers_that_cannot_measure_refuse(on_device: bool, ranks: int, message: str | None) -> None:
    """As SGLang's scheduler hands a request over; nothing else of the server takes part."""
    config = config_from({"kv_policy": "vlcache"})
    assert config is not None
    session = Session(config)
    backend = SimpleNamespace(provider=SimpleNamespace(on_device=on_device))
    session.model.served = SimpleNamespace(backend=backend, ranks=ranks, module=None, host=None)  # type: ignore[assignment]
    refused: list[str] = []
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(custom_params={"kv_report": "attention"}, beam_width=None),
        origin_input_ids=[1] * 200,
        input_embeds=None,
        multimodal_inputs=None,
        extra_key=None,
        customized_info=None,
        stream=False,
        set_finish_with_abort=refused.append,
    )
    session.requests.admit(None, request)
    assert len(refused) == (message is not None)
    assert message is None or message in refused[0]
