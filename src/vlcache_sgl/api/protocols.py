"""The two things a policy is made of.  Structural types: nothing needs to be inherited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch

from vlcache_sgl.api.tensors import Budget, LayerView, Prompt

BudgetSum = Literal["exact", "at_most", "free"]
"""How the tokens that an allocator gives to all layers relate to `Budget.total`: their sum is it, may be less, or
may be less or more."""


@runtime_checkable
class Scorer(Protocol):
    """Says which tokens of a layer matter.

    Implementations are frozen dataclasses: their fields are the parameters a user may set (int, float, bool, str,
    Literal, or one of these or None; ``field(metadata={"operator_only": True})`` keeps a field from requests).

    Optional class attributes, absent means the first value:

    * ``needs``: ``Needs()`` | what the runtime must compute; may be a property that depends on the fields;
    * ``comparable``: False | True, whether scores of different layers may be ranked against each other;
    * ``prefix_hit``: text, what happens when a part of the prompt came from the prefix cache; must be there when
      all rows are query rows, because those of the cached part are not computed;
    * ``check(model: Prompt)``: a method that raises ValueError when the model cannot be served.
    """

    query_aware: ClassVar[bool]
    """True when the score depends on the question; such a kept set serves other questions badly."""

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        """`[num_kv_heads, owned]` float, higher = keep.

        Must not read `layer` after returning.  NaN, a wrong shape or an exception (SystemExit, too) costs this request
        its compression, never its answer.
        """
        ...


@runtime_checkable
class Allocator(Protocol):
    """Divides a budget between the layers.  A frozen dataclass like a `Scorer`.

    Optional class attributes, absent means the first value:

    * ``needs``: ``Needs()``, nothing but the scores | as for scorers;
    * ``budget_sum``: "exact" | "at_most" | "free", see `BudgetSum`; a property where it depends on the fields;
    * ``compares_layers``: False | True, scores are ranked across layers: only with a ``comparable`` scorer;
    * ``reads_weights``: False | True, budgets follow `Prompt.layer_weights` or `Prompt.head_weights` where they are
      known: a server then measures them when it first serves a model;
    * ``prefix_hit`` and ``check(model)``: as for scorers.
    """

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        """`[num_layers]` int64, tokens that each layer keeps; each in `[0, owned]`.

        With ``heads=split`` also `[num_layers, num_kv_heads]`, tokens of each KV head; a layer then counts as the mean
        of its heads.  `layers[i].scores` is set.  The sum must be `budget.total`, unless the allocator declares another
        ``budget_sum``.
        """
        ...
