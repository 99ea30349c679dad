"""What a policy's choice is worth, measured on the answer itself: `kv_report: attention`.

A request that asks for it is decided on as ever, but nothing of it is evicted.  On each decode step the full cache says
where attention falls, and the decision says what of that would have been there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vlcache_kernels.select import select
from vlcache_sgl.api import Prompt


class Share(NamedTuple):
    """One decode step in one layer, both in [0, 1], higher = the choice is better."""

    mass: float
    """Attention mass on what would have been kept, answer tokens included; mean over heads."""
    hits: float
    """Cache hit rate (2410.23317, definition 3.1): of the `k` prompt tokens with most attention, `k` being how many the
    layer keeps, those that it keeps."""


def share(queries: torch.Tensor, keys: torch.Tensor, kept: torch.Tensor, scale: float) -> Share:
    """What one row of full attention finds among kept tokens.

    Args:
        queries: `[H, D]`, post-RoPE, of the step's token.
        keys: `[n + t, K, D]`, post-RoPE: the whole prompt and `t` answer tokens, this step's included.
        kept: `[G, n]` bool, prompt tokens that would have been kept; `G` is 1 (one set for all heads) or `K`.
        scale: factor of the logits.
    """
    groups, prompt = kept.shape
    heads, dim = queries.shape
    by_head = queries.float().view(keys.shape[1], -1, dim)
    logits = torch.einsum("kgd,nkd->kgn", by_head, keys.float()) * scale
    probabilities = logits.softmax(-1).view(groups, heads // groups, -1).mean(1)  # [G, n + t]
    of_prompt = probabilities[:, :prompt].contiguous()
    mass = 1 - (of_prompt * ~kept).sum(-1)
    counts = kept.sum(-1)
    best = select(of_prompt, counts).keep
    hits = (best & kept).sum(-1) / counts.clamp(min=1)
    return Share(float(mass.mean()), float(hits.mean()))


class Measured:
    """The decode steps of one request.

    Args:
        keep: `[L, G, m]` bool, owned tokens that the policy keeps.
        prompt: the request's prompt; what came from the prefix cache counts as kept.
    """

    def __init__(self, keep: torch.Tensor, prompt: Prompt) -> None:
        self._kept = torch.ones((*keep.shape[:2], prompt.length), dtype=torch.bool, device=keep.device)
        self._kept[..., prompt.start :] = keep
        self._length = prompt.length
        self._steps: dict[int, dict[int, Share]] = {}

    def observe(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, scale: float) -> None:
        """One step in one layer; see `share`."""
        self._steps.setdefault(keys.shape[0], {})[layer] = share(queries, keys, self._kept[layer], scale)

    def report(self, answered: int) -> dict[str, Any]:
        """Means over the steps that made an answer of `answered` tokens; the first token comes from the prefill.

        Returns:
            `steps`, and per layer `attention_mass` and `cache_hit_rate`; these are empty without a step.
        """
        # Under overlap scheduling one more step runs before it is known that the answer has ended.
        last = self._length + answered - 1
        steps = [layers for length, layers in self._steps.items() if length <= last]
        means = [
            [round(sum(step[layer][figure] for step in steps) / len(steps), 4) for layer in range(len(self._kept))]
            for figure in range(len(Share._fields))
            if steps
        ]
        mass, hits = means or ([], [])
        return {"steps": len(steps), "attention_mass": mass, "cache_hit_rate": hits}
