"""`check_policy` finds what it says that it finds: one planted bug per line, and nothing in a sound policy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from vlcache_sgl.api import Budget, Needs, Rows, declared
from vlcache_sgl.api.testing import PROPERTIES, ContractError, check_policy
from vlcache_sgl.policy import resolve


@dataclass(frozen=True)
class Sound:
    """A scorer that reads all sorts of things."""

    needs: ClassVar[Needs] = Needs(rows=Rows.last(90), column_sum=True, values=True, queries=True, rotary=True)
    query_aware: ClassVar[bool] = True

    def score(self, layer, prompt):
        place = declared(prompt.positions).float() / prompt.length
        row = prompt.patches().row / 100
        return declared(layer.column_sum) * declared(layer.values).float().norm(dim=-1) + place + row


@dataclass(frozen=True)
class Fair:
    """An allocator."""

    def allocate(self, layers, prompt, budget):
        return budget.distribute(torch.stack([layer.scores.float().std() for layer in layers]))


@dataclass(frozen=True)
class ReadsAgain(Sound):
    """A scorer that has the prompt read a second time."""

    needs: ClassVar[Needs] = replace(Sound.needs, rows=Rows.repeat())


SOUND = {
    "scorer": Sound(),
    "reads again": ReadsAgain(),
    "allocator": Fair(),
    "by name": "vlcache",
    "resolved": resolve("vlcache:paper"),
}


@pytest.mark.parametrize("policy", SOUND.values(), ids=SOUND)
def test_a_sound_policy_passes(policy):
    check_policy(policy)


@dataclass
class Thawed:
    query_aware: ClassVar[bool] = False

    def score(self, layer, prompt):
        return torch.zeros(prompt.num_kv_heads, prompt.owned)


@dataclass(frozen=True)
class NoRows(Sound):
    needs: ClassVar[Needs] = Needs(column_sum=True)


@dataclass(frozen=True)
class Undeclared(Sound):
    def score(self, layer, prompt):
        return declared(layer.keys).norm(dim=-1)


@dataclass(frozen=True)
class Furtive(Sound):
    """Has something else to say where the field is None, which it always is."""

    def score(self, layer, prompt):
        return super().score(layer, prompt) if layer.keys is None else layer.keys.norm(dim=-1)


@dataclass(frozen=True)
class Positional(Sound):
    needs: ClassVar[Needs] = Needs(rows=Rows.last(90), column_sum=True, values=True)


@dataclass(frozen=True)
class UndeclaredDensity(Fair):
    def allocate(self, layers, prompt, budget):
        return budget.distribute(torch.stack([declared(layer.density).mean() for layer in layers]))


@dataclass(frozen=True)
class Short(Sound):
    def score(self, layer, prompt):
        return super().score(layer, prompt)[:, 1:]


@dataclass(frozen=True)
class WholeNumbers(Sound):
    def score(self, layer, prompt):
        return super().score(layer, prompt).long()


@dataclass(frozen=True)
class Logarithm(Sound):
    def score(self, layer, prompt):
        return (super().score(layer, prompt) - 1e9).log()


@dataclass(frozen=True)
class Normalised(Sound):
    """Divides by what is 0 where all values are alike."""

    def score(self, layer, prompt):
        length = declared(layer.values).norm(dim=-1)
        return length / length.amax(-1, keepdim=True)


@dataclass(frozen=True)
class NeedsAnImage(Sound):
    def score(self, layer, prompt):
        return super().score(layer, prompt) * (prompt.vision[0].begin + 1)


@dataclass(frozen=True)
class NeedsAGrid(Sound):
    def score(self, layer, prompt):
        return super().score(layer, prompt) * (prompt.grids[0][0].rows if prompt.vision else 1)


@dataclass(frozen=True)
class Greedy(Fair):
    def allocate(self, layers, prompt, budget):
        return super().allocate(layers, prompt, budget) + 1


@dataclass(frozen=True)
class Fractions(Fair):
    def allocate(self, layers, prompt, budget):
        return super().allocate(layers, prompt, budget).float()


@dataclass(frozen=True)
class Dice(Sound):
    def score(self, layer, prompt):
        return torch.rand(prompt.num_kv_heads, prompt.owned)


@dataclass(frozen=True)
class Remembers(Sound):
    """Is told by other prompts what to think of this one."""

    lengths: ClassVar[set[int]] = set()

    def score(self, layer, prompt):
        self.lengths.add(prompt.owned + len(prompt.vision))
        return super().score(layer, prompt) + sum(self.lengths)


@dataclass(frozen=True)
class RemembersBudgets(Fair):
    last: ClassVar[list[Any]] = []

    def allocate(self, layers, prompt, budget):
        weights = torch.ones(budget.num_layers)
        weights[0] += len(self.last) and self.last[-1] != prompt.vision
        self.last.append(prompt.vision)
        return budget.distribute(weights)


@dataclass(frozen=True)
class InPlace(Sound):
    def score(self, layer, prompt):
        before = declared(layer.values).clone()
        score = super().score(layer, prompt)
        layer.values.copy_(before.abs() + 1)
        return score


@dataclass(frozen=True)
class LastDigits(Sound):
    """What rounding leaves in the last digits of a sum."""

    def score(self, layer, prompt):
        return (declared(layer.column_sum).double() * 1e9).frac().float()


@dataclass(frozen=True)
class Half(Fair):
    def allocate(self, layers, prompt, budget):
        return Budget(budget.total // 2, budget.num_layers, 0, budget.hi).distribute(torch.ones(budget.num_layers))


@dataclass(frozen=True)
class Stingy(Fair):
    """Wrong with large budgets only."""

    def allocate(self, layers, prompt, budget):
        total = min(budget.total, 900)
        return Budget(total, budget.num_layers, budget.lo, budget.hi).distribute(torch.ones(budget.num_layers))


@dataclass(frozen=True)
class Saves(Stingy):
    """The same, declared."""

    budget_sum: ClassVar[str] = "at_most"


@dataclass(frozen=True)
class NoFloor(Fair):
    def allocate(self, layers, prompt, budget):
        return Budget(budget.total, budget.num_layers, 0, budget.hi).distribute(torch.arange(budget.num_layers))


@dataclass(frozen=True)
class Float32Only(Sound):
    def score(self, layer, prompt):
        return (declared(layer.values) @ torch.ones(prompt.head_dim, 1)).squeeze(-1)


@dataclass(frozen=True)
class OnTheCPU(Sound):
    def score(self, layer, prompt):
        return super().score(layer, prompt) + torch.arange(prompt.owned)


@dataclass(frozen=True)
class AllocatesOnTheCPU(Fair):
    def allocate(self, layers, prompt, budget):
        spread = torch.stack([layer.scores.float().std() for layer in layers])
        return budget.distribute(spread * torch.arange(1, budget.num_layers + 1))


PLANTED = {
    Thawed: ("form", "Thawed must be a frozen dataclass"),
    NoRows: ("form", "needs attention or queries, but names no rows"),
    Undeclared: ("needs", "scorer Undeclared reads layer.keys, which its `needs` does not declare"),
    Furtive: ("needs", "scorer Furtive reads layer.keys, which"),
    Positional: ("needs", "scorer Positional reads prompt.positions, which"),
    UndeclaredDensity: ("needs", "allocator UndeclaredDensity reads layer.density, which"),
    Short: ("answers", "have shape (2, 299), expected (2, 300)"),
    WholeNumbers: ("answers", "scores of layer 0 are torch.int64, expected a float type"),
    Logarithm: ("answers", "scores of layer 0 contain NaN or infinity"),
    Normalised: ("answers", "contain NaN or infinity (prompt: keys that are all alike)"),
    NeedsAnImage: ("answers", "raised IndexError: tuple index out of range (prompt: text only)"),
    NeedsAGrid: ("answers", "raised IndexError: tuple index out of range (prompt: unknown grid)"),
    Greedy: ("answers", "allocator Greedy keeps 124 tokens, the budget is 120 (exact)"),
    Fractions: ("answers", "layer counts are torch.float32, expected int64"),
    Dice: ("deterministic", "scores of layer 0 differ when the same prompt is decided again"),
    Remembers: ("stateless", "scores of layer 0 differ after other prompts have been decided"),
    RemembersBudgets: ("stateless", "after other prompts have been decided"),
    InPlace: ("inputs", "scorer InPlace changes layer.values"),
    LastDigits: ("chunks", "when the prefill comes in chunks"),
    Half: ("answers", "allocator Half keeps 60 tokens, the budget is 120 (exact) (prompt: one image)"),
    Stingy: ("budget", "allocator Stingy keeps 900 tokens, the budget is 1200 (exact) (prompt: one image)"),
    NoFloor: ("budget", "gives layer 0 0 tokens, the selection's floor is"),
    Float32Only: ("precision", "raised RuntimeError: expected m1 and m2 to have the same dtype"),
    OnTheCPU: ("device", "scorer OnTheCPU mixes tensors of the CPU with those of a GPU"),
    AllocatesOnTheCPU: ("device", "allocator AllocatesOnTheCPU mixes tensors"),
}


@pytest.mark.parametrize("broken", PLANTED, ids=lambda broken: broken.__name__)
def test_a_planted_bug_is_found_in_one_line(broken):
    """By its property, hence by none of those that are checked before."""
    name, words = PLANTED[broken]
    with pytest.raises(ContractError) as caught:
        check_policy(broken())
    message = str(caught.value)
    assert message.startswith(f"policy {broken.__name__}, {name}: ")
    assert words in message
    assert "\n" not in message


def test_every_property_has_a_planted_bug():
    assert {name for name, _ in PLANTED.values()} == set(PROPERTIES)


def test_one_property_alone():
    """As a parametrised test would: the others are not looked at."""
    check_policy(NoFloor(), *(name for name in PROPERTIES if name != "budget"))
    with pytest.raises(ContractError, match="policy NoFloor, budget: "):
        check_policy(NoFloor(), "budget")


def test_an_allocator_may_declare_that_it_keeps_less():
    check_policy(Saves())
