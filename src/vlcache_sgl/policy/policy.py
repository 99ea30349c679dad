"""A policy: scorer x allocator x selection, resolved and ready to decide."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlcache_sgl._version import __version__
from vlcache_sgl.api.needs import Needs
from vlcache_sgl.api.protocols import Allocator, BudgetSum, Scorer
from vlcache_sgl.api.records import Selection
from vlcache_sgl.api.tensors import Budget, LayerView, Prompt
from vlcache_sgl.policy.checks import needs_of, needs_problem, pair_problem
from vlcache_sgl.policy.errors import PolicyError
from vlcache_sgl.policy.manager import Provider, Registry, put_together, registry
from vlcache_sgl.policy.plan import (
    EvictionPlan,
    PolicyFault,
    choose,
    competing,
    finite_layers,
    require_finite,
    stack_scores,
)
from vlcache_sgl.policy.spec import Owner, Settings, parse
from vlcache_sgl.spelling import did_you_mean
from vlcache_sgl.streams import Arriving


@dataclass(frozen=True)
class Policy:
    """What decides which tokens stay; immutable and free of state, so requests may share it."""

    spec: str
    """The text it was resolved from."""
    scorer_name: str
    scorer: Scorer
    allocator_name: str
    allocator: Allocator
    selection: Selection
    providers: tuple[str, str] = ("", "")
    """Distribution and version that scorer and allocator come from."""

    @property
    def needs(self) -> tuple[Needs, Needs]:
        """What the runtime must compute for the scorer and for the allocator.

        Raises:
            PolicyFault: one of them cannot say.
        """
        with _blame(f"`needs` of scorer {self.scorer_name} or allocator {self.allocator_name}"):
            return needs_of(self.scorer), needs_of(self.allocator)

    @property
    def reads_twice(self) -> bool:
        """Whether query rows are those of a second reading of the prompt."""
        return any(need.rows.kind == "repeat" for need in self.needs)

    @property
    def reads_weights(self) -> bool:
        """Whether layer budgets follow what was measured of the model."""
        return bool(getattr(self.allocator, "reads_weights", False))

    @property
    def query_aware(self) -> bool:
        """Whether the kept tokens are those of the first question; they then serve other questions badly."""
        return self.scorer.query_aware

    @property
    def fingerprint(self) -> str:
        """Short stable text, equal exactly when two policies decide alike: names, all parameters, selection, and the
        versions of this package and of the providers.  The budget is not in it."""
        content = {
            "version": __version__,
            "providers": self.providers,
            "scorer": [self.scorer_name, _state(self.scorer)],
            "allocator": [self.allocator_name, _state(self.allocator)],
            "selection": _state(self.selection),
        }
        text = json.dumps(content, sort_keys=True, default=repr)
        return f"{self.scorer_name}+{self.allocator_name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def decide(
        self,
        scorer_layers: Sequence[LayerView],
        allocator_layers: Sequence[LayerView],
        prompt: Prompt,
        total: int,
    ) -> EvictionPlan:
        """Score, divide the budget, choose.

        Args:
            scorer_layers, allocator_layers: one view per layer, in order, with what `needs` declares; the two may be
                the same objects when their rows agree.  `scores` is set on those of the allocator.
            prompt: geometry of the request.
            total: tokens to keep, summed over layers; more than there are means all.

        Returns:
            A plan whose counts sum to `total`, unless the allocator declares another ``budget_sum``.

        Raises:
            PolicyFault: when scorer or allocator raises or returns something unusable.
        """
        return self.plan(self.score(scorer_layers, prompt), allocator_layers, prompt, total)

    def require(self, model: Prompt) -> None:
        """Whether this policy can serve a model at all; asked once, before the first request.

        Args:
            model: a prompt of the model; its length, vision and positions do not count.

        Raises:
            PolicyError: with the reason.
        """
        parts: dict[str, Scorer | Allocator] = {
            f"scorer {self.scorer_name}": self.scorer,
            f"allocator {self.allocator_name}": self.allocator,
        }
        for name, part in parts.items():
            with refused(name):
                needs = needs_of(part)
            if needs.rotary and model.rotary is None:
                raise PolicyError(f"{name} needs the model's rotary embedding, which is not known for this model")
            if check := getattr(part, "check", None):
                with refused(name):
                    check(model)

    def score(self, layers: Sequence[LayerView], prompt: Prompt) -> torch.Tensor:
        """The first half of `decide`: `[num_layers, num_kv_heads, owned]` float32; `plan` refuses NaN and infinity.

        Raises:
            PolicyFault: the scorer raises or returns something unusable.
        """
        with _blame(f"scorer {self.scorer_name}"):
            scores = [self.scorer.score(layer, prompt) for layer in layers]
        return stack_scores(scores, prompt)

    def plan(self, scores: torch.Tensor, layers: Sequence[LayerView], prompt: Prompt, total: int) -> EvictionPlan:
        """The second half of `decide`: budgets from the allocator's views, then the choice.

        Args:
            scores: `[L, K, owned]` float32, `K` = ``prompt.num_kv_heads``.
            layers: one view per layer, with what the allocator needs.
            prompt: geometry; with tensor parallelism that of all ranks' heads.
            total: see `decide`.

        Raises:
            PolicyFault: scores are not finite; the allocator raises or returns something unusable.
        """
        finite = Arriving(finite_layers(scores))
        rivals = competing(scores, prompt, self.selection)
        for view, score in zip(layers, rivals.unbind(), strict=True):
            view.scores = score
        budget = budget_for(total, prompt, self.selection)
        try:
            with _blame(f"allocator {self.allocator_name}"):
                counts = self.allocator.allocate(layers, prompt, budget)
            if isinstance(counts, torch.Tensor):
                counts = counts.detach().to("cpu")
        finally:
            require_finite(finite)  # first: an allocator may have stumbled over the scorer's NaN
        plan = choose(rivals, counts, prompt, self.selection)
        rule: BudgetSum = getattr(self.allocator, "budget_sum", "exact")
        if plan.total != budget.total and (rule == "exact" or (rule == "at_most" and plan.total > budget.total)):
            raise PolicyFault(
                f"allocator {self.allocator_name} keeps {plan.total:g} tokens, the budget is {budget.total} ({rule})"
            )
        return plan


def budget_for(total: int, prompt: Prompt, selection: Selection) -> Budget:
    """The budget that allocators see: `total` capped at what is owned, floor from the selection."""
    total = min(max(0, total), prompt.num_layers * prompt.owned)
    average = total / max(1, prompt.num_layers)
    return Budget(total=total, num_layers=prompt.num_layers, lo=math.floor(selection.floor * average), hi=prompt.owned)


def resolve(
    text: str, *, installed: Registry | None = None, from_request: bool = False, head_cells: bool = False
) -> Policy:
    """The policy that `text` names.

    Args:
        text: ``NAME``, ``NAME:variant-or-key=value,...`` or ``scorer=A,allocator=B,key=value,...``.
        installed: where to look names up; the installed plugins by default.
        from_request: the text comes from a client: refuse parameters that only the operator may set.
        head_cells: whether KV heads may keep different tokens; decides what ``heads=auto`` means.

    Raises:
        PolicyError: one line for the user, with the choices.
    """
    installed = registry() if installed is None else installed
    installed.require_sound()
    spec = parse(text)
    selection = Selection()
    layers: list[Mapping[str, Any]] = [spec.settings]
    scorer_name, allocator_name = spec.scorer, spec.allocator
    if spec.name is not None:
        recipe = installed.recipe(spec.name).record
        scorer_name, allocator_name, selection = recipe.scorer, recipe.allocator, recipe.selection
        for variant in spec.variants:
            if variant not in recipe.variants:
                choices = ", ".join(recipe.variants) or "none"
                meant = did_you_mean(variant, recipe.variants)
                raise PolicyError(f"policy {spec.name} has no variant {variant!r}{meant}; variants: {choices}")
        layers = [recipe.params, *(recipe.variants[variant] for variant in spec.variants), spec.settings]
    assert scorer_name is not None
    assert allocator_name is not None
    last = len(layers) - 1
    settings = [Settings(given, from_request and number == last) for number, given in enumerate(layers)]
    parts = put_together(installed.scorers, installed.allocators, scorer_name, allocator_name, settings)
    scorer, allocator = installed.scorer(parts.scorer), installed.allocator(parts.allocator)
    owners, values = parts.owners, parts.values
    built = (
        _build(owners[0], values["scorer"], scorer.provider),
        _build(owners[1], values["allocator"], allocator.provider),
    )
    if problem := pair_problem(*built):
        raise PolicyError(f"scorer {parts.scorer} and allocator {parts.allocator}: {problem}")
    chosen = _select(selection, values["selection"])
    if chosen.heads == "auto":
        chosen = dataclasses.replace(chosen, heads="split" if head_cells else "shared")
    return Policy(
        spec=text.strip(),
        scorer_name=parts.scorer,
        scorer=built[0],
        allocator_name=parts.allocator,
        allocator=built[1],
        selection=chosen,
        providers=(_release(scorer.provider), _release(allocator.provider)),
    )


def _build(owner: Owner, values: Mapping[str, Any], provider: Provider) -> Any:
    with refused(owner.title):
        built = owner.factory(**values)
        problem = needs_problem(built)
    if problem:
        raise PolicyError(f"{owner.title} of {provider}: {problem}")
    return built


def _select(base: Selection, values: Mapping[str, Any]) -> Selection:
    try:
        return dataclasses.replace(base, **values)
    except (ValueError, TypeError) as error:
        raise PolicyError(f"selection: {error}") from error


def _release(provider: Provider) -> str:
    return f"{provider.distribution} {provider.version}"


def _state(thing: object) -> dict[str, Any]:
    """All fields, computed ones too: a table read from a file counts with its content."""
    return {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing)}  # type: ignore[arg-type]


@contextlib.contextmanager
def _blame(what: str) -> Iterator[None]:
    try:
        yield
    except (PolicyFault, KeyboardInterrupt):
        raise
    except BaseException as error:  # a plugin that calls `sys.exit` must not end the server
        raise PolicyFault(f"{what} raised {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Around a stranger's code that runs before a policy serves: whatever it raises is a PolicyError about `what`."""
    try:
        yield
    except (PolicyError, KeyboardInterrupt):
        raise
    except BaseException as error:  # as above
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise PolicyError(f"{what}: {kind}{error}") from error
