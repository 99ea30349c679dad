"""Attention over cells against a float64 formula that knows nothing of cells."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_reference import reference

from vlcache_sgl.attention import torch as torch_provider
from vlcache_sgl.attention.torch import Gather, prefix_keys_values
from vlcache_sgl.memory.decode_index import DecodeIndex, collect
from vlcache_sgl.memory.residency import Residency

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Arena:
    """A residency with an arena that has random contents for resident tokens."""

    def __init__(self, layers: int, groups: int, heads: int, dim: int, tokens: int, dtype: torch.dtype) -> None:
        self.groups = groups
        self.residency = Residency(layers * groups, tokens, layers * groups * tokens)
        self.arena = torch.zeros(layers * groups * tokens + 1, 2, heads // groups, dim, dtype=dtype)
        self.gather = Gather(self.arena, dtype)

    def fill(self, slots: torch.Tensor) -> None:
        self.residency.attach(slots)
        cells = self.residency.table[:, slots].long()
        self.arena[cells] = torch.randn(*cells.shape, *self.arena.shape[1:]).to(self.arena.dtype)

    def planes(self, layer: int) -> slice:
        return slice(layer * self.groups, (layer + 1) * self.groups)

    def dense(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values `[n, K, D]` and residency `[K, n]` of all slots."""
        cells = self.residency.table[self.planes(layer)][:, slots].long()
        both = self.arena[cells.clamp(min=0)]
        merged = both.permute(1, 2, 0, 3, 4).flatten(2, 3)
        heads = merged.shape[2] // self.groups
        return merged[:, 0], merged[:, 1], (cells >= 0).repeat_interleave(heads, 0)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("groups", [1, 2], ids=["layer-cells", "head-cells"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 32), (4, 4, 80), (8, 2, 64)])
@pytest.mark.parametrize(("old", "new"), [(0, 7), (1, 1), (37, 5), (130, 63)])
def test_extend(dtype: torch.dtype, groups: int, heads: int, kv_heads: int, dim: int, old: int, new: int) -> None:
    torch.manual_seed(old * 1000 + new)
    arena = Arena(2, groups, kv_heads, dim, old + 1, dtype)
    slots = torch.arange(1, old + 1)
    arena.fill(slots)
    if old > 1:
        keep = torch.rand(2 * groups, old) < 0.4
        keep[:, 0] = True
        arena.residency.reclaim(arena.residency.evict(slots, keep))
    scale = dim**-0.5
    q = torch.randn(new, heads, dim).to(dtype)
    k, v = (torch.randn(new, kv_heads, dim).to(dtype) for _ in range(2))
    for layer in range(2):
        prefix = valid = None
        if old:
            row = collect(arena.residency, slots)
            prefix, valid = prefix_keys_values(arena.gather, row, arena.planes(layer))
        got = torch_provider.extend(q, k, v, prefix, valid, scale)
        old_k, old_v, resident = arena.dense(layer, slots)
        visible = torch.cat(
            [
                resident[:, None].expand(-1, new, -1),
                torch.ones(new, new, dtype=torch.bool).tril().expand(kv_heads, -1, -1),
            ],
            -1,
        )
        want = reference(q, torch.cat([old_k, k]), torch.cat([old_v, v]), scale, visible)
        assert (got.double() - want).abs().max() < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("valid", [[5, 0], [0, 5], [0, 0]], ids=str)
def test_heads_without_a_prefix_attend_as_if_there_were_none(dtype: torch.dtype, valid: list[int]) -> None:
    """Outputs and log-sum-exps of such a head are those of the new tokens alone."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 32), torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    q, k, v, prefix = (x.to(dtype) for x in (q, k, v, torch.randn(5, 2, 2, 32)))
    alone, alone_lse = torch_provider.extend_with_lse(q, k, v, None, None, 32**-0.5)
    joined, joined_lse = torch_provider.extend_with_lse(q, k, v, prefix, torch.tensor(valid), 32**-0.5)
    without = torch.tensor([count == 0 for count in valid]).repeat_interleave(3)
    assert torch.equal(joined[:, without], alone[:, without])
    torch.testing.assert_close(joined_lse[:, without], alone_lse[:, without])
    assert not torch.equal(joined[:, ~without], alone[:, ~without]) or not any(valid)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("groups", [1, 2], ids=["layer-cells", "head-cells"])
def test_decode_over_a_changing_batch(dtype: torch.dtype, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of very different length join, leave and grow; each attends to its own cells only."""
    monkeypatch.setattr(torch_provider, "GATHER_BYTES", 20_000)  # small parts, so that batches are split
    torch.manual_seed(0)
    heads, kv_heads, dim, layers = 6, 2, 32, 3
    arena = Arena(layers, groups, kv_heads, dim, 2000, dtype)
    req_to_token = torch.zeros(8, 600, dtype=torch.int32)
    free = itertools.count(1)
    lengths: dict[int, int] = {}

    def admit(row: int, tokens: int, kept: float) -> None:
        slots = torch.tensor([next(free) for _ in range(tokens)])
        arena.fill(slots)
        keep = torch.rand(layers * groups, tokens) < kept
        keep[:, -1] = True
        arena.residency.reclaim(arena.residency.evict(slots, keep))
        req_to_token[row, :tokens] = slots.int()
        lengths[row] = tokens
        index.invalidate(row)

    index = DecodeIndex(arena.residency, req_to_token)
    admit(3, 400, 0.1)
    admit(5, 30, 1.0)
    admit(1, 350, 0.5)
    scale = dim**-0.5
    for step in range(75):  # more than the slack of one layout
        if step == 4:
            del lengths[5]
        if step == 6:
            admit(5, 77, 0.3)
        rows = list(lengths)
        new_slots = torch.tensor([next(free) for _ in rows])
        arena.fill(new_slots)
        for row, slot in zip(rows, new_slots.tolist(), strict=True):
            req_to_token[row, lengths[row]] = slot
            lengths[row] += 1
        index.step(rows, [lengths[row] for row in rows], arena.residency.table[:, new_slots].long())
        if step % 5 and step < 70:
            continue
        q = torch.randn(len(rows), heads, dim).to(dtype)
        for layer in range(layers):
            got = torch_provider.decode(q, index, arena.planes(layer), arena.gather, scale)
            for number, row in enumerate(rows):
                k, v, resident = arena.dense(layer, req_to_token[row, : lengths[row]].long())
                want = reference(q[number : number + 1], k, v, scale, resident[:, None])
                assert (got[number : number + 1].double() - want).abs().max() < TOLERANCES[dtype]
    assert arena.residency.check_integrity() == []
