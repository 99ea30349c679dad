"""Cells are conserved, whatever happens in whatever order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vlcache_sgl.memory.residency import EVICTED, OutOfCells, Residency

PLANES, SLOTS, CELLS = 3, 20, 42


class ResidencyMachine(RuleBasedStateMachine):
    """Against a model that is a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(PLANES, SLOTS, CELLS)
        self.kept: dict[int, list[bool]] = {}

    def model_cells(self) -> int:
        return sum(sum(planes) for planes in self.kept.values())

    @rule(count=st.integers(1, 6))
    def attach(self, count: int) -> None:
        free = [slot for slot in range(1, SLOTS + 1) if slot not in self.kept][:count]
        if not free:
            return
        before = self.residency.table.clone()
        if len(free) * PLANES > self.residency.free_cells:
            with pytest.raises(OutOfCells):
                self.residency.attach(torch.tensor(free))
            assert torch.equal(before, self.residency.table)
        else:
            self.residency.attach(torch.tensor(free))
            self.kept.update({slot: [True] * PLANES for slot in free})

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.kept)), unique=True, min_size=1))
        keep = [[data.draw(st.booleans()) for _ in slots] for _ in range(PLANES)]
        eviction = self.residency.evict(torch.tensor(slots), torch.tensor(keep))
        for number, slot in enumerate(slots):
            self.kept[slot] = [old and keep[plane][number] for plane, old in enumerate(self.kept[slot])]
        self.residency.reclaim(eviction)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.kept)), unique=True, min_size=1))
        expected = sum(sum(self.kept.pop(slot)) for slot in slots)
        before = self.residency.free_cells
        self.residency.reclaim(self.residency.detach(torch.tensor(slots)))
        assert self.residency.free_cells - before == expected

    @invariant()
    def conserved(self) -> None:
        assert self.residency.used_cells == self.model_cells()
        assert self.residency.check_integrity() == []
        for slot, planes in self.kept.items():
            assert (self.residency.table[:, slot] != EVICTED).tolist() == planes


ResidencyMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestResidency = ResidencyMachine.TestCase


def test_integrity_notices_a_planted_bug() -> None:
    """A check that cannot fail proves nothing."""
    residency = Residency(2, 4, 8)
    residency.attach(torch.tensor([1, 2]))
    residency.table[1, 2] = residency.table[0, 1]
    problems = " ".join(residency.check_integrity())
    assert "used twice" in problems
    assert "lost" in problems


def test_neighbouring_tokens_get_neighbouring_cells() -> None:
    residency = Residency(2, 8, 16)
    residency.attach(torch.arange(1, 6))
    for plane in range(2):
        assert residency.table[plane, 1:6].diff().tolist() == [1, 1, 1, 1]
