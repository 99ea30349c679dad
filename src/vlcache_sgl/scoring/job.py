"""What one request asks for, and how far its compression has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from vlcache_sgl.api import Grid, Prompt, Span
from vlcache_sgl.config import ConfigError, KVBudget, KVConfig, Share
from vlcache_sgl.memory.own_slots import HostShare
from vlcache_sgl.policy import PolicyError, resolve
from vlcache_sgl.policy.custom_params import LONGEST_SPEC, RequestParams
from vlcache_sgl.policy.tier import require_agnostic
from vlcache_sgl.weights import ModelWeights

if TYPE_CHECKING:
    from vlcache_sgl.compression.recall import Recall
    from vlcache_sgl.compression.sharing.guard import DecodeReading, GuardReading
    from vlcache_sgl.compression.sharing.images import SharedImage
    from vlcache_sgl.policy import Policy
    from vlcache_sgl.scoring.scoring import Scoring
    from vlcache_sgl.sglang_hooks.media import Run
    from vlcache_sgl.sglang_hooks.second_reading import ReadingState

Phase = Literal["prefill", "decode"]
"""Where a guard has seen what a request misses."""
MOST_CHOICES = 1024
"""Resolved choices that are remembered; clients can think of any number."""


@dataclass(frozen=True)
class Choice:
    """A policy at a budget: what a prefix namespace stands for."""

    policy: Policy
    budget: KVBudget
    share: Share = "policy"
    copy_name: str = ""
    """With ``tiered``: fingerprint of the share policy and its budget."""
    weights: ModelWeights | None = None
    """What layers and heads of the model need, where that is known."""

    @property
    def fingerprint(self) -> str:
        """Distinguishes compressed prefixes in the radix tree."""
        weights = "" if self.weights is None else f"~{self.weights.digest}"
        return f"{self.policy.fingerprint}@{self.budget}{weights}{self.copy_name and '+' + self.copy_name}"

    def of_model(self, model: Prompt) -> Prompt:
        """`model` with the weights that this choice stands for."""
        if self.weights is None:
            return model
        return replace(model, layer_weights=self.weights.layers, head_weights=self.weights.heads)


class Choices:
    """Turns what requests ask for into choices, within the server's limits."""

    def __init__(self, config: KVConfig) -> None:
        self._config = config
        self._known: dict[tuple[str, KVBudget, Share], Choice] = {}
        self._weights: ModelWeights | None = None
        self._model: Prompt | None = None
        self._ranks = 1
        try:
            self.copies = resolve(config.share_policy)
            """The policy that makes copies for everybody."""
            require_agnostic(self.copies)
        except PolicyError as error:
            raise PolicyError(f"--kv-share-scorer, --kv-profile: {error}") from error
        self.default = self._choice(config.policy, config.budget, config.share)
        if self.default.policy.reads_twice and config.guard != "off":
            raise PolicyError(
                f"policy {config.policy!r} makes one copy for all questions, which --kv-guard cannot replace"
            )

    def use_weights(self, weights: ModelWeights) -> None:
        """Later choices give the model's layers and heads these weights; earlier ones keep theirs.

        Raises:
            ValueError: they are those of a model of another shape.
        """
        if self._model is not None:
            weights.check(self._model.num_layers, self._model.num_kv_heads)
        self._weights = weights
        self._known.clear()
        self.default = self._choice(self._config.policy, self._config.budget, self._config.share)

    @property
    def weights(self) -> ModelWeights | None:
        """In use; None when not known."""
        return self._weights

    def serve(self, model: Prompt, ranks: int) -> None:
        """From now on only choices that can serve this model over so many tensor-parallel ranks are made.

        Raises:
            PolicyError: when the default cannot.
        """
        self._model, self._ranks = model, ranks
        self._require(self.default.policy)
        self._require(self.copies)

    def _require(self, policy: Policy) -> None:
        if self._model is None:
            return
        policy.require(self._model)
        _, needs = policy.needs
        if self._ranks > 1 and (needs.queries or needs.keys or needs.values):
            raise PolicyError(
                f"allocator {policy.allocator_name} reads keys or queries, of which a rank has only its own"
            )

    def _choice(self, spec: str, budget: KVBudget, share: Share, from_request: bool = False) -> Choice:
        key = (spec, budget, share)
        if key not in self._known:
            policy = resolve(spec, from_request=from_request, head_cells=self._config.head_cells)
            if policy.selection.heads == "split" and not self._config.head_cells:
                raise PolicyError(f"policy {spec!r} keeps other tokens per KV head, which needs --kv-head-cells")
            if share == "exact" and self._config.host_memory == "off":
                raise ConfigError("kv_share exact needs a server with --kv-host-memory")
            if policy.reads_twice and share == "exact":
                share = "policy"  # its copy serves all questions
            if policy.reads_twice and share == "tiered":
                raise PolicyError(
                    f"policy {spec!r} makes one copy for all questions: kv_share must be policy or off, not tiered"
                )
            self._require(policy)
            if len(self._known) >= MOST_CHOICES:
                del self._known[next(iter(self._known))]
            copy_name = f"{self.copies.fingerprint}@{self._config.share_budget:g}" if share == "tiered" else ""
            self._known[key] = Choice(policy, budget, share, copy_name, self._weights)
        return self._known[key]

    def select(self, params: RequestParams, length: int) -> Choice:
        """What serves a request with a prompt of `length` tokens.

        Raises:
            ConfigError: for a value out of bounds or a policy that is not allowed; the message is for the client.
            PolicyError: for an unknown policy or parameter.
        """
        spec = self._config.policy if params.policy is None else params.policy
        if len(spec) > LONGEST_SPEC and spec != self._config.policy:
            raise ConfigError(f"kv_policy must have at most {LONGEST_SPEC} characters, got {len(spec)}")
        self._check_allowed(spec)
        budget = params.budget or self._config.budget
        self._check_bounds(budget, length)
        return self._choice(spec, budget, params.share or self._config.share, from_request=spec != self._config.policy)

    def _check_allowed(self, spec: str) -> None:
        allowed = self._config.allow_policies
        if spec == self._config.policy or "*" in allowed:
            return
        if spec.partition(":")[0] not in allowed or "=" in spec.partition(":")[0]:
            names = ", ".join(dict.fromkeys((self._config.policy, *allowed)))
            raise ConfigError(f"kv_policy {spec!r} is not allowed on this server; choose one of: {names}")

    def _check_bounds(self, budget: KVBudget, length: int) -> None:
        if budget == self._config.budget:
            return
        low, high = self._config.budget_min, self._config.budget_max
        share = budget.fraction if budget.fraction is not None else min(1.0, (budget.tokens or 1) / max(1, length))
        if not low <= share <= high:
            meant = "" if budget.fraction is not None else f", {share:.3g} of this prompt,"
            raise ConfigError(f"kv_budget {budget}{meant} is out of this server's bounds {low:g} to {high:g}")


@dataclass
class CompressionJob:
    """One request's way to a compressed prompt; lives on SGLang's request object."""

    choice: Choice
    vision: tuple[Span, ...]
    """Vision tokens of the prompt, absolute positions."""
    length: int
    """Tokens of the prompt, generated ones not counted."""
    min_tokens: int
    runs: tuple[Run, ...] = ()
    """What is known of each span of `vision`: for the policy, and for a report with `positions`."""
    positions: bool = False
    """Whether the report lists kept positions."""
    measures_recall: bool = False
    """Whether nothing is evicted, and the report says what of the answer's attention the decision would have kept."""
    recall: Recall | None = None
    """Set when the decision has fallen; only with `measures_recall`."""
    scoring: Scoring | None = None
    done: bool = False
    """Whether the decision has fallen, either way."""
    reached: int | None = None
    """Where the last chunk ended; a chunk that begins elsewhere belongs to a new prefill."""
    report: dict[str, Any] = field(default_factory=dict)
    """What was done, for the response's metadata."""
    tokens: Sequence[int] = ()
    """The prompt's token numbers, SGLang's array."""
    image: SharedImage | None = None
    """What is known of the prompt's first picture; None where nothing needs to be."""
    base_key: str = ""
    """The radix key's namespace, without the generation of the picture's copy."""
    generation: int = 0
    """Of the copy that this request looks for or makes."""
    guard: GuardReading | None = None
    """How well the present prefill finds what it looks for."""
    decode_guard: DecodeReading | None = None
    """The same for the first decode steps, also of whoever has just compressed the picture."""
    trips: int = 0
    """How often it did not, and started over."""
    missed: float = 0.0
    """The reading of the last time."""
    missed_in: Phase = "prefill"
    """Whose reading it was."""
    shared: int = 0
    """Tokens that the prefix cache served to the present prefill."""
    shared_kept: tuple[torch.Tensor, Any | None] | None = None
    """`[L]` float32 on the host, shares of these that each layer has, and the event after which it may be read."""
    outcome: dict[str, Any] | None = None
    """Report of a prefill that had ended when the request was retracted; None: it had not."""
    counted: bool = False
    """Whether this request is among those that were compressed or left alone."""
    counted_hit: bool = False
    """Whether it is among those that found an image."""
    inherited: torch.Tensor | None = None
    """`[L, end]` bool: what the copy before the one that this request makes has of the pictures."""
    repeated: int = 0
    """Tokens behind the prompt that read it again: of an internal request, which computes both and keeps the prompt."""
    compressed: bool = False
    """Whether something was evicted from the prompt."""
    reading: ReadingState | None = None
    """How far the second reading of this request's prompt has come, by another request; only where the policy asks."""

    host: HostShare | None = None
    """Set where the prefix is shared without loss."""
    chunk: Span = field(default_factory=lambda: Span(0, 0))
    """What the present forward computes."""

    @property
    def reads_decode(self) -> bool:
        """Whether decode steps of this request are looked at."""
        return self.recall is not None or (self.decode_guard is not None and not self.decode_guard.complete)

    @property
    def grids(self) -> tuple[tuple[Grid, ...], ...]:
        """`Prompt.grids`."""
        return tuple(run.grids for run in self.runs)

    @property
    def pictures_end(self) -> int:
        """Position behind the last picture."""
        return self.vision[-1].end if self.vision else 0

    @property
    def end(self) -> int:
        """Where the decision falls: behind the prompt, or behind its second reading."""
        return self.length + self.repeated

    def holds_back(self, up_to: int) -> bool:
        """Whether ``[0, up_to)`` must not be published yet."""
        return not self.done and up_to < self.end

    def publishes(self, up_to: int) -> int:
        """How much of ``[0, up_to)`` the prefix tree may have: of a second reading nothing, and nothing of a prompt
        whose compression failed in it."""
        if not self.repeated:
            return up_to
        return min(up_to, self.length) if self.compressed else 0

    @property
    def first_kept(self) -> int:
        """Where the tokens begin about which this request decides: its own, or all where nothing is lost."""
        return 0 if self.host is not None else self.shared

    def first_evictable(self) -> int:
        """Where the tokens begin that this request may evict.

        What lies in front of the first image, a system prompt for instance, is there for other images too.
        """
        return max(self.first_kept, self.vision[0].begin) if self.vision else self.first_kept

    def send_back(self, missing: float, seen_in: Phase) -> None:
        """The guard has tripped: what was done is undone, and does not count."""
        self.trips += 1
        self.missed, self.missed_in = round(missing, 4), seen_in
        self.done = self.counted = False

    def restart(self) -> None:
        """Begin anew: the request was retracted and is prefilled again."""
        if self.done:
            self.outcome = dict(self.report)
        self.scoring = None
        self.done = self.compressed = False
        self.reached = None
        self.guard = self.decode_guard = None
        self.shared_kept = None
        if self.host is not None:
            self.host.restart()
        self.report.clear()
        if self.trips:
            self.report.update(recomputed=self.trips, missed=self.missed, missed_in=self.missed_in)


JOB_ATTRIBUTE = "vlcache_job"


def job_of(req: Any) -> CompressionJob | None:
    """The job of SGLang's request `req`; None when it is served uncompressed."""
    job: CompressionJob | None = getattr(req, JOB_ATTRIBUTE, None)
    return job
