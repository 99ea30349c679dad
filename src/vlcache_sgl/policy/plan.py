"""Scores and budgets in, kept set out.  Pure: the same tensors give the same plan on every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlcache_kernels.select import select
from vlcache_sgl.api.records import Selection
from vlcache_sgl.api.tensors import Prompt
from vlcache_sgl.streams import Arriving, to_device


class PolicyFault(ValueError):
    """A policy returned something that cannot be acted on; the request keeps its full cache."""


@dataclass(frozen=True)
class EvictionPlan:
    """What stays of one request, per layer."""

    keep: torch.Tensor
    """`[L, G, m]` bool: owned tokens that stay; `G` is 1 with ``heads=shared``, the KV heads with ``heads=split``."""
    counts: torch.Tensor
    """`[L, G]` int64 on the CPU: tokens in each set, exactly ``keep.sum(-1)``."""

    @property
    def total(self) -> float:
        """Kept tokens, summed over layers; sets of a layer count as their mean."""
        return int(self.counts.sum()) / max(1, self.counts.shape[1])

    @property
    def differs_by_head(self) -> bool:
        """Whether KV heads of a layer keep different numbers of tokens."""
        return not torch.equal(self.counts, self.counts[:, :1].expand_as(self.counts))

    @property
    def tokens_per_layer(self) -> list[float]:
        """Tokens that each layer keeps, whole numbers unless heads differ: then the mean of its heads."""
        if not self.differs_by_head:
            return list(self.counts[:, 0].tolist())
        return [round(mean, 3) for mean in self.counts.double().mean(1).tolist()]


def make_plan(
    scores: Sequence[torch.Tensor], counts: torch.Tensor, prompt: Prompt, selection: Selection
) -> EvictionPlan:
    """Choose exactly as many owned tokens as `counts` says, in every layer or, when heads are split, in every KV head.

    Tokens are taken in this order, ties going to the lower position:

    1. the protected ones: the first ``selection.sink`` tokens of the prompt, then the latest of the recent window.
       A window that does not fit beside the sinks shrinks from its old end;
    2. text by score, if ``selection.protect == "text"``;
    3. everything else by score.

    With ``span > 1`` a token's score is the mean over its run of `span` neighbours, so whole runs come and go
    together; runs are counted from position 0 of the prompt.  The count stays exact because the last run that does
    not fit whole gives its lower positions only.

    Args:
        scores: per layer `[K, m]` float, higher = keep, finite.
        counts: `[L]` int64, any device, each in `[0, m]`: the same for all sets of a layer.  `[L, K]` when heads are
            split: for each KV head.
        prompt: geometry; scores are on ``prompt.device`` or any other one device, where the plan is made.
        selection: the rule.

    Raises:
        PolicyFault: for scores or counts of a wrong shape, dtype or range, NaN and infinity.
    """
    stacked = stack_scores(scores, prompt)
    require_finite(Arriving(finite_layers(stacked)))
    return choose(competing(stacked, prompt, selection), counts, prompt, selection)


def competing(scores: torch.Tensor, prompt: Prompt, selection: Selection) -> torch.Tensor:
    """`[L, G, m]` float32, what tokens compete with in each set of a layer: one set for all KV heads, or one per head.

    Args:
        scores: `[L, K, m]` float32, higher = keep.
    """
    if selection.heads == "shared":
        scores = scores.mean(1, keepdim=True) if selection.reduce == "mean" else scores.amax(1, keepdim=True)
    if selection.span > 1:
        scores = _mean_of_runs(scores, prompt.start % selection.span, selection.span)
    return scores


def choose(scores: torch.Tensor, counts: torch.Tensor, prompt: Prompt, selection: Selection) -> EvictionPlan:
    """The last step of `make_plan`.

    Args:
        scores: `[L, G, m]`, see `competing`.
        counts: see `make_plan`.

    Raises:
        PolicyFault: for counts of a wrong shape, dtype or range.
    """
    layers, groups, owned = scores.shape
    amounts = _check_counts(counts, layers, groups, owned)
    if scores.numel() == 0:
        return EvictionPlan(torch.zeros_like(scores, dtype=torch.bool), amounts)
    on_device = to_device(amounts.flatten(), scores.device)
    tiers = _tiers(on_device, prompt, selection, scores.device)
    found = select(scores.flatten(0, 1), on_device, tiers=tiers)
    return EvictionPlan(found.keep.view(scores.shape), amounts)


def stack_scores(scores: Sequence[torch.Tensor], prompt: Prompt) -> torch.Tensor:
    """`[L, K, m]` float32 from one `[K, m]` tensor per layer; for NaN and infinity see `require_finite`.

    Raises:
        PolicyFault: when a layer's scores have another shape than `[num_kv_heads, owned]`, or are no floats.
    """
    expected = (prompt.num_kv_heads, prompt.owned)
    if len(scores) != prompt.num_layers:
        raise PolicyFault(f"scores for {len(scores)} layers, expected {prompt.num_layers}")
    for index, layer in enumerate(scores):
        if not isinstance(layer, torch.Tensor):
            raise PolicyFault(f"scores of layer {index} are a {type(layer).__name__}, expected a tensor")
        if tuple(layer.shape) != expected:
            raise PolicyFault(
                f"scores of layer {index} have shape {tuple(layer.shape)}, expected {expected} = (KV heads, owned)"
            )
        if not layer.is_floating_point():
            raise PolicyFault(f"scores of layer {index} are {layer.dtype}, expected a float type")
    return torch.stack([layer.to(torch.float32) for layer in scores])


def finite_layers(scores: torch.Tensor) -> torch.Tensor:
    """`[L]` bool, which layers of `scores` `[L, K, m]` are free of NaN and infinity."""
    return torch.isfinite(scores).flatten(1).all(1)


def require_finite(layers: Arriving) -> None:
    """Refuse scores by their `finite_layers`, which arrive while the allocator reads the device: one wait for both.

    Raises:
        PolicyFault: naming the first layer that is not finite.
    """
    finite = layers.value()
    if not bool(finite.all()):
        worst = int((~finite).nonzero()[0])
        raise PolicyFault(f"scores of layer {worst} contain NaN or infinity")


def _check_counts(counts: torch.Tensor, layers: int, groups: int, owned: int) -> torch.Tensor:
    """`[L, G]` on the CPU."""
    if not isinstance(counts, torch.Tensor):
        raise PolicyFault(f"layer counts are a {type(counts).__name__}, expected a tensor")
    if counts.dtype != torch.int64:
        raise PolicyFault(f"layer counts are {counts.dtype}, expected int64")
    if tuple(counts.shape) not in {(layers,), (layers, groups)}:
        expected = f"({layers},)" if groups == 1 else f"({layers},) or ({layers}, {groups})"
        raise PolicyFault(f"layer counts have shape {tuple(counts.shape)}, expected {expected}")
    amounts = counts.detach().to("cpu")
    if layers and not 0 <= int(amounts.min()) <= int(amounts.max()) <= owned:
        raise PolicyFault(f"layer counts must be in [0, {owned}], got {amounts.tolist()}")
    return amounts if amounts.dim() == 2 else amounts[:, None].expand(-1, groups)


def _mean_of_runs(scores: torch.Tensor, lead: int, span: int) -> torch.Tensor:
    """Every token's score replaced by the mean of the owned part of its run; `lead` tokens of the first run are
    not owned."""
    owned = scores.shape[-1]
    tail = -(lead + owned) % span
    runs = torch.nn.functional.pad(scores, (lead, tail))
    runs = runs.reshape(*scores.shape[:-1], -1, span)
    size = torch.nn.functional.pad(torch.ones(owned, device=scores.device), (lead, tail)).reshape(-1, span)
    mean = runs.sum(-1, keepdim=True) / size.sum(-1, keepdim=True).clamp(min=1)
    spread: torch.Tensor = mean.expand_as(runs).flatten(-2)
    return spread[..., lead : lead + owned]


def _tiers(counts: torch.Tensor, prompt: Prompt, selection: Selection, device: torch.device) -> torch.Tensor:
    """`[sets, m]` int8 for `counts` `[sets]`: 2 = protected, 1 = text (if protected), 0 = the rest."""
    owned = prompt.owned
    position = torch.arange(owned, device=device)
    sinks = counts.clamp(max=min(max(0, selection.sink - prompt.start), owned))
    if selection.recent >= 1:
        window = torch.full_like(counts, int(selection.recent))
    else:
        # The small term undoes binary rounding: 0.29 of 100 tokens is 29.  A window that was asked for is never empty.
        window = (selection.recent * counts.double() + 1e-9).floor().long()
        window = window.clamp(min=1 if selection.recent > 0 else 0)
    window = torch.minimum(window, counts - sinks)
    protected = (position < sinks[:, None]) | (position >= owned - window[:, None])
    rest = torch.zeros(owned, dtype=torch.int8, device=device)
    if selection.protect == "text":
        rest = (~prompt.is_vision()).to(device, torch.int8)
    return torch.where(protected, 2, rest)
