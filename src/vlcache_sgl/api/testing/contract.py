"""The contract of a policy, checked without a server: what is wrong is said in one line."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlcache_sgl.api.needs import Needs
from vlcache_sgl.api.protocols import Allocator, Scorer
from vlcache_sgl.api.records import Selection
from vlcache_sgl.api.tensors import Budget, Grid, LayerView, Prompt
from vlcache_sgl.api.testing.synthetic import Layer, synthetic_layers, synthetic_prompt, view_layers
from vlcache_sgl.policy import Policy, resolve
from vlcache_sgl.policy.checks import allocator_problem, needs_problem, pair_problem, scorer_problem
from vlcache_sgl.policy.plan import EvictionPlan, PolicyFault
from vlcache_sgl.policy.policy import budget_for

Property = Literal[
    "form",
    "needs",
    "answers",
    "deterministic",
    "stateless",
    "inputs",
    "chunks",
    "budget",
    "precision",
    "device",
]
"""What is checked, in this order:

* ``form``: frozen dataclasses with parameters that a user can set, the right methods, needs that can be met;
* ``needs``: only fields of `LayerView` and `Prompt` are read that `needs` declares;
* ``answers``: scores and counts of the right shape and type, finite, in range, the sum as declared (``budget_sum``,
  by default the budget), for every kind of prompt: text only, several images, a video, grids that are not known,
  prefix hits, three tokens, keys that are all alike or very long;
* ``deterministic``: the same again, whatever the random seeds are;
* ``stateless``: the same again after other prompts have been decided;
* ``inputs``: nothing that was handed in is changed;
* ``chunks``: the same, but for rounding, however the prefill was divided into chunks;
* ``budget``: the same of budgets from a hundredth to everything, and no layer has less than the floor of the
  selection, unless ``budget_sum`` is "free";
* ``precision``: queries, keys and values may be bfloat16;
* ``device``: no tensor on the CPU is mixed with those on a GPU.  Tried on fake tensors, which need no GPU; what comes
  after a value has been read back to the host is not seen.
"""
PROPERTIES: tuple[Property, ...] = get_args(Property)

_REPEATED = 24
"""Rows of the second reading, for policies that ask for one."""
_GIVEN = {
    "one image": synthetic_prompt(300, [(10, 260)]),
    "two images": synthetic_prompt(300, [(10, 100), (120, 260)]),
    "image last": synthetic_prompt(90, [(10, 90)]),
    "text only": synthetic_prompt(70, []),
    "tiny": synthetic_prompt(3, [(1, 2)]),
    "prefix in image": synthetic_prompt(300, [(10, 260)], start=50),
    "prefix after image": synthetic_prompt(300, [(10, 260)], start=280),
    "video": replace(synthetic_prompt(150, [(10, 130)]), grids=((Grid(5, 8), Grid(5, 8), Grid(5, 8)),)),
    "unknown grid": replace(synthetic_prompt(150, [(10, 130)]), grids=((),)),
}
PROMPTS: Mapping[str, Prompt] = {name: replace(prompt, repeated=_REPEATED) for name, prompt in _GIVEN.items()}
"""With a second reading, for policies that ask for one."""
SHARES = (0.01, 0.1, 0.5, 1.0)
"""Budgets that are tried, of the owned tokens."""
CHUNK = 64
"""Tokens per chunk of a prefill that is divided."""
_TOLERANCE = 1e-3
"""Tolerance as a share of the largest score: float32 sums of a few hundred rows in another order differ by far less."""


class ContractError(AssertionError):
    """A policy breaks its contract; the message names the policy, the property and what is wrong, in one line."""


def check_policy(policy: str | Policy | Scorer | Allocator, *properties: Property) -> None:
    """Check what every policy promises; stop at the first promise that is broken.

    Args:
        policy: what `--kv-policy` would be given, or a scorer or allocator that need not be registered yet: it is
            then put together with a plain other half.
        properties: which of `PROPERTIES`; all of them by default.

    Raises:
        ContractError: a promise is broken.
        PolicyError: there is no such policy.
    """
    whole = resolve(policy) if isinstance(policy, str) else _whole(policy)
    for name in properties or PROPERTIES:
        try:
            problem = _CHECKS[name](whole)
        except PolicyFault as error:
            problem = str(error)
        if problem is not None:
            raise ContractError(f"policy {whole.spec}, {name}: {' '.join(problem.split())}")


# -- what a policy is tried on ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Places:
    """The other half of an allocator that is checked alone: scores that are all different."""

    query_aware: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        place = torch.arange(prompt.start, prompt.length, device=prompt.device, dtype=torch.float32)
        head = torch.arange(prompt.num_kv_heads, device=prompt.device)[:, None]
        return torch.sin(place * (2 + layer.index) + head) * (1 + layer.index)


@dataclass(frozen=True)
class _Equal:
    """The other half of a scorer that is checked alone."""

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        return budget.distribute(torch.ones(budget.num_layers))


def _whole(part: Policy | Scorer | Allocator) -> Policy:
    """`part` as a policy."""
    if isinstance(part, Policy):
        return part
    name = type(part).__name__
    if isinstance(part, Allocator):
        return Policy(name, "places", _Places(), name, part, Selection())
    return Policy(name, name, part, "equal", _Equal(), Selection())


@functools.cache
def _layers(name: str, seed: int = 0) -> list[Layer]:
    return synthetic_layers(PROMPTS[name], seed)


def _as_declared(prompt: Prompt, policy: Policy) -> Prompt:
    """What the policy gets to know of a prompt."""
    if not any(needs.rotary for needs in policy.needs):
        prompt = replace(prompt, rotary=None, positions=None)
    if not any(needs.rows.kind == "repeat" for needs in policy.needs):
        prompt = replace(prompt, repeated=0)
    return prompt


Views = tuple[list[LayerView], list[LayerView]]


@dataclass(frozen=True)
class _Answer:
    """A decision, with the scores that it followed from."""

    scores: torch.Tensor
    """`[L, K, m]`."""
    plan: EvictionPlan

    def difference(self, other: _Answer) -> str | None:
        """What is not the same, or None."""
        if not torch.equal(self.scores, other.scores):
            layer = int((self.scores != other.scores).flatten(1).any(1).nonzero()[0])
            return f"scores of layer {layer} differ"
        if not torch.equal(self.plan.counts, other.plan.counts):
            return f"layer counts are {self.plan.counts.tolist()}, then {other.plan.counts.tolist()}"
        return None


def _views(policy: Policy, name: str, seed: int = 0, chunk: int = 0) -> Views:
    """What the scorer and the allocator get to see of one of `PROMPTS`; copies, which they may spoil."""
    scorer, allocator = ([_copy(view) for view in _seen(name, seed, needs, chunk)] for needs in policy.needs)
    return scorer, allocator


@functools.cache
def _seen(name: str, seed: int, needs: Needs, chunk: int) -> list[LayerView]:
    return view_layers(_layers(name, seed), PROMPTS[name], needs, chunk)


def _copy(view: LayerView) -> LayerView:
    return _mapped(view, torch.Tensor.clone)


def _mapped(view: LayerView, change: Callable[[torch.Tensor], torch.Tensor]) -> LayerView:
    """A view with every tensor changed."""
    tensors: dict[str, Any] = {
        name: change(value) for name, value in vars(view).items() if isinstance(value, torch.Tensor)
    }
    return replace(view, **tensors)


def _decide(policy: Policy, views: Views, prompt: Prompt, share: float = 0.1) -> _Answer:
    scores = policy.score(views[0], prompt)
    return _Answer(scores, policy.plan(scores, views[1], prompt, _total(prompt, share)))


def _total(prompt: Prompt, share: float) -> int:
    return max(prompt.num_layers, round(share * prompt.owned * prompt.num_layers))


def _answer(policy: Policy, name: str, seed: int = 0, chunk: int = 0) -> _Answer:
    """The decision about one of `PROMPTS`."""
    return _decide(policy, _views(policy, name, seed, chunk), _as_declared(PROMPTS[name], policy))


# -- the properties, each a function that says what is wrong ----------------------------------------------------------


def _form(policy: Policy) -> str | None:
    scorer, allocator = f"scorer {policy.scorer_name}", f"allocator {policy.allocator_name}"
    found = {
        scorer: needs_problem(policy.scorer),
        allocator: needs_problem(policy.allocator),
        f"{scorer} and {allocator}": pair_problem(policy.scorer, policy.allocator),
    }
    said = [f"{what}: {problem}" for what, problem in found.items() if problem]
    of_class = scorer_problem(scorer, type(policy.scorer)) or allocator_problem(allocator, type(policy.allocator))
    return of_class or next(iter(said), None)


def _needs(policy: Policy) -> str | None:
    for name in ("one image", "prefix in image"):
        prompt = _as_declared(PROMPTS[name], policy)
        scorer_views, allocator_views = _views(policy, name)
        scorer = _Watch(policy.needs[0], scorer_views, prompt)
        allocator = _Watch(policy.needs[1], allocator_views, prompt)
        with contextlib.suppress(PolicyFault):  # another property's business
            scores = policy.score(scorer.layers, scorer.prompt)
            policy.plan(scores, allocator.layers, allocator.prompt, _total(prompt, 0.1))
        for what, watch in (
            (f"scorer {policy.scorer_name}", scorer),
            (f"allocator {policy.allocator_name}", allocator),
        ):
            if undeclared := sorted(watch.reads - watch.declared):
                return f"{what} reads {', '.join(undeclared)}, which its `needs` does not declare"
    return None


class _Watch:
    """What a scorer or allocator may read of a prompt, and what it does read."""

    def __init__(self, needs: Needs, views: Sequence[LayerView], prompt: Prompt) -> None:
        self.declared = {f"layer.{f}" for view in views for f, value in vars(view).items() if value is not None}
        self.declared |= {f"prompt.{f}" for f in _DECLARED_OF_PROMPT} if needs.rotary else set()
        self.reads: set[str] = set()
        self.layers = [self._watched(_WatchedView, view) for view in views]
        self.prompt: Prompt = self._watched(_WatchedPrompt, prompt)

    def _watched(self, watcher: type[Any], original: object) -> Any:
        copy = watcher(**vars(original))
        object.__setattr__(copy, "_reads", self.reads)  # a prompt is frozen
        return copy


_DECLARED_OF_PROMPT = frozenset({"rotary", "positions"})
"""Fields of a prompt that `Needs.rotary` stands for; all others are known of every prompt."""
_VIEW_FIELDS = frozenset(f.name for f in fields(LayerView))


class _WatchedView(LayerView):
    """A layer that remembers which of its fields are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in _VIEW_FIELDS and (name != "scores" or vars(self)["scores"] is None):
            object.__getattribute__(self, "_reads").add(f"layer.{name}")
        return object.__getattribute__(self, name)


class _WatchedPrompt(Prompt):
    """A prompt that remembers which of its fields are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in _DECLARED_OF_PROMPT:
            object.__getattribute__(self, "_reads").add(f"prompt.{name}")
        return object.__getattribute__(self, name)


def _answers(policy: Policy) -> str | None:
    for name in PROMPTS:
        with _about(name):
            _answer(policy, name)
    prompt = _as_declared(PROMPTS["one image"], policy)
    for name, factor in (("keys that are all alike", 0.0), ("very long keys", 1e3)):
        layers = [Layer(layer.queries, layer.keys * factor, layer.values * factor) for layer in _layers("one image")]
        scorer, allocator = (view_layers(layers, prompt, needs) for needs in policy.needs)
        with _about(name):
            _decide(policy, (scorer, allocator), prompt)
    return None


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Says in a fault which prompt it is about."""
    try:
        yield
    except PolicyFault as error:
        raise PolicyFault(f"{error} (prompt: {name})") from error


def _deterministic(policy: Policy) -> str | None:
    for name in ("one image", "prefix in image"):
        answers = []
        for seed in (1, 2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                answers.append(_answer(policy, name))
        if found := answers[0].difference(answers[1]):
            return f"{found} when the same prompt is decided again"
    return None


def _stateless(policy: Policy) -> str | None:
    first = _answer(policy, "one image")
    for length in (211, 97):  # like no other prompt of this file
        other = _as_declared(synthetic_prompt(length, [(7, 90)], repeated=_REPEATED), policy)
        layers = synthetic_layers(other)
        scorer, allocator = (view_layers(layers, other, needs) for needs in policy.needs)
        _decide(policy, (scorer, allocator), other)
    if found := first.difference(_answer(policy, "one image")):
        return f"{found} after other prompts have been decided"
    return None


def _inputs(policy: Policy) -> str | None:
    prompt = _as_declared(PROMPTS["one image"], policy)
    views = _views(policy, "one image")
    before = [[_copy(view) for view in part] for part in views]
    _decide(policy, views, prompt)
    names = (f"scorer {policy.scorer_name}", f"allocator {policy.allocator_name}")
    for what, part, copies in zip(names, views, before, strict=True):
        for view, copy in zip(part, copies, strict=True):
            for field, value in vars(copy).items():
                if isinstance(value, torch.Tensor) and not torch.equal(getattr(view, field), value):
                    return f"{what} changes layer.{field}, which others read too"
    return None


def _chunks(policy: Policy) -> str | None:
    for name in ("one image", "prefix in image"):
        whole, divided = _answer(policy, name), _answer(policy, name, chunk=CHUNK)
        # Scores that rank may turn over where two are alike: what counts is that they are the same but for rounding.
        apart = (whole.scores - divided.scores).abs().flatten(1).amax(1)
        bound = _TOLERANCE * whole.scores.abs().flatten(1).amax(1).clamp(min=1e-12)
        if bool((apart > bound).any()):
            layer = int((apart > bound).nonzero()[0])
            return f"scores of layer {layer} differ by {float(apart[layer]):.3g} when the prefill comes in chunks"
        if int((whole.plan.counts - divided.plan.counts).abs().max()) > 1:
            counts = whole.plan.counts.tolist(), divided.plan.counts.tolist()
            return f"layer counts are {counts[0]}, and {counts[1]} when the prefill comes in chunks"
    return None


def _budget(policy: Policy) -> str | None:
    what = f"allocator {policy.allocator_name}"
    for name in PROMPTS:
        prompt = _as_declared(PROMPTS[name], policy)
        views = _views(policy, name)
        scores = policy.score(views[0], prompt)
        for selection in (policy.selection, replace(policy.selection, floor=0.2)):
            variant = replace(policy, selection=selection)
            for share in SHARES:
                budget = budget_for(_total(prompt, share), prompt, selection)
                with _about(name):
                    plan = variant.plan(scores, views[1], prompt, budget.total)
                if problem := _floor_problem(policy.allocator, plan, budget):
                    return f"{what} {problem} (prompt: {name})"
    return None


def _floor_problem(allocator: Allocator, plan: EvictionPlan, budget: Budget) -> str | None:
    """Whether a layer has less than `Budget.lo`; that the sum is right `Policy.plan` sees to."""
    if getattr(allocator, "budget_sum", "exact") == "free":
        return None
    if int(plan.counts.min()) < budget.lo:
        layer = int(plan.counts.amin(1).argmin())
        return f"gives layer {layer} {int(plan.counts[layer].min())} tokens, the selection's floor is {budget.lo}"
    return None


def _precision(policy: Policy) -> str | None:
    prompt = _as_declared(PROMPTS["one image"], policy)
    views = _views(policy, "one image")
    for view in (*views[0], *views[1]):
        for name in ("queries", "keys", "values"):
            value = getattr(view, name)
            setattr(view, name, None if value is None else value.bfloat16())
    with _about("bfloat16 queries, keys and values"):
        _decide(policy, views, prompt)
    return None


def _device(policy: Policy) -> str | None:
    name = "one image"
    host = _as_declared(PROMPTS[name], policy)
    views = _views(policy, name)
    scores = policy.score(views[0], host)
    with FakeTensorMode(allow_non_fake_inputs=True):
        positions = None if host.positions is None else _faked(host.positions)
        prompt = replace(host, device=torch.device("cuda"), positions=positions)
        fakes = [[_mapped(view, _faked) for view in part] for part in views]
        for view, score in zip(fakes[1], scores.unbind(), strict=True):
            view.scores = _faked(score)
        budget = budget_for(_total(prompt, 0.1), prompt, policy.selection)
        scored = _mixing(lambda: [policy.scorer.score(view, prompt) for view in fakes[0]])
        allocated = _mixing(lambda: policy.allocator.allocate(fakes[1], prompt, budget))
    for what, mixing in ((f"scorer {policy.scorer_name}", scored), (f"allocator {policy.allocator_name}", allocated)):
        if mixing is not None:
            return f"{what} mixes tensors of the CPU with those of a GPU: {mixing}"
    return None


def _mixing(call: Callable[[], object]) -> str | None:
    """PyTorch's complaint about tensors of two devices, or None."""
    try:
        call()
    except Exception as error:
        # Others are about fake tensors: that they have no values to read back, or that an operator does not know them.
        said = str(error).partition("\n")[0]
        return said if "different devices" in said or "same device" in said else None
    return None


def _faked(value: torch.Tensor) -> torch.Tensor:
    """A tensor without content, on a GPU that need not be there."""
    return torch.empty(value.shape, dtype=value.dtype, device="cuda")


_CHECKS: Mapping[Property, Callable[[Policy], str | None]] = {
    "form": _form,
    "needs": _needs,
    "answers": _answers,
    "deterministic": _deterministic,
    "stateless": _stateless,
    "inputs": _inputs,
    "chunks": _chunks,
    "budget": _budget,
    "precision": _precision,
    "device": _device,
}
assert tuple(_CHECKS) == PROPERTIES
