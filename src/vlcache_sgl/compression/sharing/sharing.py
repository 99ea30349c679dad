"""What compression has to do with sharing: the copy's kept set, the sketch of the rest, and the guard's reading."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from vlcache_sgl.api import Prompt
from vlcache_sgl.compression.sharing.guard import LAST_ROWS, DecodeReading, GuardReading
from vlcache_sgl.compression.sharing.images import PrefixSketch, SharedImages, prefix_digest
from vlcache_sgl.compression.sharing.sketch import SHARE, KeySketch
from vlcache_sgl.compression.sharing.state import SharingState
from vlcache_sgl.config import KVConfig
from vlcache_sgl.policy import Policy
from vlcache_sgl.policy.plan import EvictionPlan
from vlcache_sgl.policy.tier import copy_policy, copy_total, joined, layer_weights
from vlcache_sgl.scoring.scoring import KeysValues, Scoring
from vlcache_sgl.scoring.tensor_parallel import HeadGather

logger = logging.getLogger(__name__)


class Sharing:
    """One rank's part of sharing; `Expansions` is the scheduler's.

    Args:
        config: the server's settings.
        policy: makes copies for everybody.
        model: what policies are told of the model.
        images: what is shared.
        arena_bytes: sketches may take `SHARE` of them.
    """

    def __init__(self, config: KVConfig, policy: Policy, model: Prompt, images: SharedImages, arena_bytes: int) -> None:
        self._config = config
        self._policy = policy
        self._images = images
        self._most_bytes = int(SHARE * arena_bytes)
        self.weights = layer_weights(policy, model, config.share_budget)
        """What each layer is worth to later questions, sum 1."""
        self.reads_decode = True
        """Whether attention shows its decode steps: in plain torch, where the heads of a layer keep the same tokens."""

    # -- what a copy keeps ------------------------------------------------------------------------------------------

    def copy_plan(
        self, state: SharingState, prompt: Prompt, own: EvictionPlan, keys_values: KeysValues, heads: HeadGather
    ) -> EvictionPlan:
        """The request's `own` plan, or the one that serves everybody where a copy is to be made.

        The question behind the last picture is not shared with other questions: it stays whole if it is shorter than
        --kv-min-tokens, as questions after a prefix hit do, and keeps what `own` keeps of it otherwise.
        """
        image = state.image
        if image is None:
            return own
        if image.leader is not None and state.generation > image.generation:
            self._images.learn(image)
        split = state.asked.pictures_end - prompt.start
        if split <= 0 or (state.asked.choice.share != "tiered" and image.level == 0):
            return own
        stretch = replace(prompt, length=state.asked.pictures_end)
        inherited = None if state.inherited is None else state.inherited[:, prompt.start : state.asked.pictures_end]
        share = image.budget(self._config.share_budget)
        policy = copy_policy(self._policy, stretch, own.keep[..., :split].any(1), inherited)
        views = Scoring(stretch, policy.needs).views(lambda layer: keys_values(layer)[:split])
        copy = heads.decide(policy, *views, stretch, copy_total(stretch, share))
        tail = own.keep[..., split:]
        if tail.shape[-1] < state.asked.min_tokens:
            tail = torch.ones_like(tail)
        state.report.update(share="tiered", share_budget=share, generation=state.generation)
        return joined(copy, tail)

    # -- what it lacks ----------------------------------------------------------------------------------------------

    def remember(
        self,
        state: SharingState,
        prompt: Prompt,
        keep: torch.Tensor,
        keys_of: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> None:
        """Sketch what is about to be evicted of the pictures, and let the answer's first steps look at it.

        Args:
            keep: `[L, G, m]` bool, of this rank's head groups.
            keys_of: layer and `[G, n]` bool, equally many per group -> `[K, e, D]`, the keys of those of the first
                `n` owned tokens.
        """
        split = state.asked.pictures_end - prompt.start
        if self._config.guard == "off" or state.image is None or split <= 0:
            return
        try:
            groups = self._sketch(keep[..., :split], keys_of)
        except Exception as error:  # a picture without a sketch is shared without a guard
            logger.warning("no sketch of a picture: %s: %s", type(error).__name__, error)
            return
        digest = prefix_digest(state.tokens, state.asked.pictures_end, str(state.generation).encode())
        sketch = PrefixSketch(state.generation, state.asked.pictures_end, groups)
        self._images.remember(state.image, digest, sketch, self._most_bytes)
        if groups and self.reads_decode:
            earlier = () if state.decode_guard is None else state.decode_guard.sketches
            state.decode_guard = DecodeReading((*earlier, sketch), self.weights, state.asked.length)

    def _sketch(
        self, keep: torch.Tensor, keys_of: Callable[[int, torch.Tensor], torch.Tensor]
    ) -> tuple[tuple[tuple[int, ...], KeySketch], ...]:
        """Sketches of layers that are worth something, see `PrefixSketch.groups`; arguments as in `remember`."""
        by_count: dict[int, dict[int, torch.Tensor]] = {}
        for layer, weight in enumerate(self.weights):
            if weight:
                evicted = keys_of(layer, ~keep[layer])
                by_count.setdefault(evicted.shape[1], {})[layer] = evicted
        groups = []
        for evicted_by_layer in by_count.values():
            sketch = KeySketch.of(torch.cat(list(evicted_by_layer.values())), keep.shape[-1])
            if sketch is not None:
                groups.append((tuple(evicted_by_layer), sketch))
        return tuple(groups)

    def watch(self, state: SharingState, hit: int) -> None:
        """A prompt begins with `hit` tokens from the prefix cache: read what it misses of their pictures."""
        image = state.image
        if self._config.guard == "off" or image is None:
            return
        begin = str(state.generation).encode()
        known = tuple(
            sketch
            for digest, sketch in image.sketches.items()
            if sketch.end <= hit and sketch.groups and digest == prefix_digest(state.tokens, sketch.end, begin)
        )
        if known:
            first_row = max(hit, state.asked.pictures_end, state.asked.length - LAST_ROWS)
            state.guard = GuardReading(known, first_row, state.asked.length, self.weights)
            if self.reads_decode:
                state.decode_guard = DecodeReading(known, self.weights, state.asked.length)
