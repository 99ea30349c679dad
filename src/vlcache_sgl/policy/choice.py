"""Which policy at which budget serves a request, within the limits of the server."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlcache_sgl.api import Prompt
from vlcache_sgl.config import ConfigError, KVBudget, KVConfig, Share
from vlcache_sgl.policy.custom_params import MAX_SPEC_LENGTH, RequestParams
from vlcache_sgl.policy.errors import PolicyError
from vlcache_sgl.policy.policy import Policy, resolve
from vlcache_sgl.weights import ModelWeights

MAX_CHOICES = 1024
"""Resolved choices that are remembered; clients can think of any number."""


@dataclass(frozen=True)
class Choice:
    """A policy at a budget: what a prefix namespace stands for."""

    policy: Policy
    budget: KVBudget
    share: Share = "policy"
    weights: ModelWeights | None = None
    """What layers and heads of the model need, where that is known."""
    recall: int = 0
    """Evicted tokens that each layer gets back in each decode step."""

    @property
    def fingerprint(self) -> str:
        """Distinguishes compressed prefixes in the radix tree."""
        weights = "" if self.weights is None else f"~{self.weights.digest}"
        return f"{self.policy.fingerprint}@{self.budget}{weights}"

    def of_model(self, model: Prompt) -> Prompt:
        """`model` with the weights that this choice stands for."""
        if self.weights is None:
            return model
        return replace(model, layer_weights=self.weights.layers, head_weights=self.weights.heads)


class Choices:
    """Turns what requests ask for into choices, within the server's limits."""

    def __init__(self, config: KVConfig) -> None:
        self._config = config
        self._known: dict[tuple[str, KVBudget, Share, int], Choice] = {}
        self._weights: ModelWeights | None = None
        self._model: Prompt | None = None
        self._ranks = 1
        self.default = self._choice(config.policy, config.budget, config.share, config.recall)

    def use_weights(self, weights: ModelWeights) -> None:
        """Later choices give the model's layers and heads these weights; earlier ones keep theirs.

        Raises:
            ValueError: they are those of a model of another shape.
        """
        if self._model is not None:
            weights.check(self._model.num_layers, self._model.num_kv_heads)
        self._weights = weights
        self._known.clear()
        config = self._config
        self.default = self._choice(config.policy, config.budget, config.share, config.recall)

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

    def _require(self, policy: Policy) -> None:
        if self._model is None:
            return
        policy.require(self._model)
        _, needs = policy.needs
        if self._ranks > 1 and (needs.queries or needs.keys or needs.values):
            raise PolicyError(
                f"allocator {policy.allocator_name} reads keys or queries, of which a rank has only its own"
            )

    def _choice(self, spec: str, budget: KVBudget, share: Share, recall: int, from_request: bool = False) -> Choice:
        key = (spec, budget, share, recall)
        if key not in self._known:
            policy = resolve(spec, from_request=from_request, head_cells=self._config.head_cells)
            if policy.selection.heads == "split" and not self._config.head_cells:
                raise PolicyError(f"policy {spec!r} keeps other tokens per KV head, which needs --kv-head-cells")
            if share == "exact" and not self._config.wants_host_memory:
                raise ConfigError("kv_share exact needs a server with host memory (--kv-host-memory)")
            if policy.reads_twice and share == "exact":
                share = "policy"  # its copy serves all questions
            if share != "exact":
                recall = 0  # host memory has nothing of the prompt
            self._require(policy)
            if len(self._known) >= MAX_CHOICES:
                del self._known[next(iter(self._known))]
            self._known[key] = Choice(policy, budget, share, self._weights, recall)
        return self._known[key]

    def select(self, params: RequestParams, length: int | None) -> Choice:
        """What serves a request with a prompt of `length` tokens; None: not known yet.

        Raises:
            ConfigError: for a value out of bounds or a policy that is not allowed; the message is for the client.
            PolicyError: for an unknown policy or parameter.
        """
        spec = self._config.policy if params.policy is None else params.policy
        if len(spec) > MAX_SPEC_LENGTH and spec != self._config.policy:
            raise ConfigError(f"kv_policy must have at most {MAX_SPEC_LENGTH} characters, got {len(spec)}")
        self._check_allowed(spec)
        budget = params.budget or self._config.budget
        self._check_bounds(budget, length)
        share = params.share or self._config.share
        recall = self._config.recall if params.recall is None else params.recall
        if params.recall and not self._config.recall:
            raise ConfigError("kv_recall needs a server with --kv-recall")
        choice = self._choice(spec, budget, share, recall, from_request=spec != self._config.policy)
        if params.recall and not choice.recall:
            why = f"policy {spec!r} makes one selection for all" if share == "exact" else f"kv_share is {share}"
            raise ConfigError(f"kv_recall brings nothing back: {why}")
        return choice

    def _check_allowed(self, spec: str) -> None:
        allowed = self._config.allow_policies
        if spec == self._config.policy or "*" in allowed:
            return
        if spec.partition(":")[0] not in allowed or "=" in spec.partition(":")[0]:
            names = ", ".join(dict.fromkeys((self._config.policy, *allowed)))
            raise ConfigError(f"kv_policy {spec!r} is not allowed on this server; choose one of: {names}")

    def _check_bounds(self, budget: KVBudget, length: int | None) -> None:
        if budget == self._config.budget or (budget.fraction is None and length is None):
            return
        low, high = self._config.budget_min, self._config.budget_max
        share = budget.fraction if budget.fraction is not None else min(1.0, (budget.tokens or 1) / max(1, length or 1))
        if not low <= share <= high:
            meant = "" if budget.fraction is not None else f", {share:.3g} of this prompt,"
            raise ConfigError(f"kv_budget {budget}{meant} is out of this server's bounds {low:g} to {high:g}")
