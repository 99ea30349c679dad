"""The plugin's settings: parsed once from flags, frozen, handed down whole."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

Scope = Literal["vision", "all"]
Share = Literal["policy", "tiered", "off"]
Guard = Literal["off", "observe", "enforce"]

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


def shown(value: object) -> str:
    """`value` for a message: clients may send texts of megabytes and lists in lists in lists."""
    return _SHOWN.repr(value)


class ConfigError(ValueError):
    """A flag has a value that cannot be served; the message is one line for the user."""


@dataclass(frozen=True)
class KVBudget:
    """How much of a prompt stays: a fraction of its tokens, or average tokens per layer."""

    fraction: float | None = None
    """In (0, 1]; 1 keeps everything."""
    tokens: int | None = None
    """Average tokens per layer, at least 1."""

    @classmethod
    def parse(cls, value: object, name: str = "--kv-budget") -> KVBudget:
        """Read ``0.1``, ``"0.1"`` or ``64``; integers above 1 (and texts without a point) are tokens per layer.

        Raises:
            ConfigError: when the value is neither.
        """
        problem = ConfigError(
            f"{name} must be a fraction in (0, 1] or a whole number of tokens per layer, got {shown(value)}"
        )
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise problem
        try:
            number = float(value)
        except (ValueError, OverflowError):  # a whole number of hundreds of digits
            raise problem from None
        if 0 < number <= 1:
            return cls(fraction=number)
        if 1 < number < 2**31 and number == int(number):
            return cls(tokens=int(number))
        raise problem

    @property
    def keeps_all(self) -> bool:
        return self.fraction == 1.0

    def target(self, owned: int, length: int, num_layers: int) -> int:
        """Tokens to keep of `owned` new tokens of a prompt of `length`, summed over layers.

        A token budget is meant for the whole prompt: the part that a prefix hit brought has had its share.
        """
        share = self.fraction if self.fraction is not None else min(1.0, (self.tokens or 1) / max(1, length))
        return max(num_layers, min(round(share * owned * num_layers), owned * num_layers))

    def __str__(self) -> str:
        # As it is written in a flag or a request: a whole number above 1 is tokens.
        return f"{self.fraction:g}" if self.fraction is not None else f"{self.tokens}"


@dataclass(frozen=True)
class KVConfig:
    """Everything the command line says about KV compression."""

    policy: str
    budget: KVBudget = field(default_factory=lambda: KVBudget(fraction=0.1))
    scope: Scope = "vision"
    """``vision``: only prompts with images or videos are compressed."""
    min_tokens: int = 128
    """Prompts with fewer new tokens are left alone."""
    overcommit: float | None = None
    """Virtual slots per physical token; None = from the budget."""
    head_cells: bool = False
    """Give every KV head its own cells, so that heads may keep different tokens."""
    budget_min: float = 0.01
    budget_max: float = 1.0
    """Bounds of what a request may ask for, as fractions of its prompt."""
    allow_policies: tuple[str, ...] = ("*",)
    """Policies a request may ask for, by name; ``*`` is every installed one."""
    share: Share = "policy"
    """What other requests find of a compressed picture: what the first one's policy kept (``policy``), a copy made for
    everybody (``tiered``), or nothing (``off``)."""
    share_budget: float = 0.2
    """Share of a picture's cells that a copy for everybody keeps."""
    share_scorer: str = "keydiff"
    """The query-agnostic scorer of such a copy, with parameters."""
    profile: str | None = None
    """File of layer weights (`vlcache calibrate`): what each layer is worth to later questions."""
    guard: Guard = "off"
    """Whether questions about a shared picture are watched (``observe``), what they lack fetched (``enforce``)."""
    guard_threshold: float = 0.2
    """Share of a question's attention that may fall on evicted tokens, in (0, 1)."""

    @property
    def share_policy(self) -> str:
        """The policy that makes a copy for everybody."""
        allocator = "uniform" if self.profile is None else f"table,file={self.profile}"
        return f"scorer={self.share_scorer},allocator={allocator}"

    @property
    def overcommit_factor(self) -> float:
        """Virtual slots per physical token, at least 1.

        ``auto`` is 0.8 / budget, capped at 16: a slot costs 4 bytes per plane, which a compressed token always
        repays, and the margin of 0.2 covers decoded tokens, which are not compressed.
        """
        if self.overcommit is not None:
            return self.overcommit
        share = self.budget.fraction if self.budget.fraction is not None else 0.1
        return min(16.0, max(1.0, 0.8 / share))


@dataclass(frozen=True)
class Flag:
    """One command-line flag."""

    name: str
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    switch: bool = False

    @property
    def dest(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")


FLAGS: tuple[Flag, ...] = (
    Flag(
        "--kv-policy",
        "Compress the KV cache of prompts with this policy: NAME[:key=value,...] or "
        "scorer=A,allocator=B[,key=value,...]; `vlcache policies` lists them. Default: no compression.",
        metavar="POLICY",
    ),
    Flag(
        "--kv-budget",
        "What stays of a prompt: a fraction in (0, 1], or average tokens per layer as an integer. Default: 0.1.",
        metavar="BUDGET",
    ),
    Flag(
        "--kv-scope",
        "Which prompts are compressed: those with images or videos, or all. Default: vision.",
        choices=get_args(Scope),
    ),
    Flag("--kv-min-tokens", "Prompts with fewer new tokens are left alone. Default: 128.", metavar="TOKENS"),
    Flag(
        "--kv-overcommit",
        "Virtual token slots per physical token: `auto` (from the budget) or a factor from 1 to 64. Default: auto.",
        metavar="FACTOR",
    ),
    Flag(
        "--kv-head-cells",
        "Account KV memory per KV head, so that policies with heads=split may keep different tokens per head.",
        switch=True,
    ),
    Flag(
        "--kv-budget-min", "Least fraction of a prompt that a request may ask to keep. Default: 0.01.", metavar="SHARE"
    ),
    Flag("--kv-budget-max", "Largest fraction that a request may ask to keep. Default: 1.0.", metavar="SHARE"),
    Flag(
        "--kv-allow-policies",
        "Comma-separated names of the policies a request may choose; `*` for all, `none` for only the default. "
        "Default: *.",
        metavar="NAMES",
    ),
    Flag(
        "--kv-share",
        "What other requests find of a picture: `policy`, what the first request's policy kept; `tiered`, a copy made "
        "for all questions; `off`, nothing. Default: tiered with --kv-profile, policy without.",
        choices=get_args(Share),
    ),
    Flag(
        "--kv-share-budget",
        "Share of a picture that a copy for all questions keeps, in (0, 1]. Default: 0.2.",
        metavar="SHARE",
    ),
    Flag(
        "--kv-share-scorer",
        "Scorer of such a copy, NAME[,key=value,...]; it must not look at the question. Default: keydiff.",
        metavar="SCORER",
    ),
    Flag(
        "--kv-profile",
        "Layer weights for such a copy and for the guard, made by `vlcache calibrate`. Default: all layers alike.",
        metavar="FILE",
    ),
    Flag(
        "--kv-guard",
        "Estimate for each question about a shared picture how much of its attention evicted tokens would get: "
        "`observe` reports it, `enforce` also computes the picture anew when it is too much. Default: off.",
        choices=get_args(Guard),
    ),
    Flag(
        "--kv-guard-threshold",
        "Share of a question's attention that may be missing, in (0, 1). Default: 0.2.",
        metavar="SHARE",
    ),
)


def config_from(values: Mapping[str, Any]) -> KVConfig | None:
    """Settings from flag values (``{"kv_policy": ..., ...}``; None = not given); None when no policy is asked for.

    Only syntax and ranges are checked here; `vlcache_sgl.policy.resolve` checks that the policy exists.

    Raises:
        ConfigError: with one line that names the flag.
    """
    given = {flag.dest: values[flag.dest] for flag in FLAGS if values.get(flag.dest) not in (None, False)}
    policy = given.pop("kv_policy", None)
    if policy is None:
        if given:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ConfigError(f"{names} needs --kv-policy")
        return None
    if not isinstance(policy, str) or not policy.strip():
        raise ConfigError(f"--kv-policy must name a policy, got {policy!r}")
    readers: dict[str, Callable[[object], object]] = {
        "kv_budget": lambda value: KVBudget.parse(value),
        "kv_scope": lambda value: _read_choice("--kv-scope", value, get_args(Scope)),
        "kv_min_tokens": _read_min_tokens,
        "kv_overcommit": _read_overcommit,
        "kv_head_cells": bool,
        "kv_budget_min": lambda value: _read_share("--kv-budget-min", value),
        "kv_budget_max": lambda value: _read_share("--kv-budget-max", value),
        "kv_allow_policies": _read_names,
        "kv_share": lambda value: _read_choice("--kv-share", value, get_args(Share)),
        "kv_share_budget": lambda value: _read_share("--kv-share-budget", value),
        "kv_share_scorer": str,
        "kv_profile": str,
        "kv_guard": lambda value: _read_choice("--kv-guard", value, get_args(Guard)),
        "kv_guard_threshold": lambda value: _read_share("--kv-guard-threshold", value),
    }
    parsed: dict[str, Any] = {name.removeprefix("kv_"): readers[name](value) for name, value in given.items()}
    known = {f.name for f in fields(KVConfig)}
    assert set(parsed) <= known
    if "profile" in parsed:
        parsed.setdefault("share", "tiered")  # who has calibrated expects later questions
    config = KVConfig(policy=policy.strip(), **parsed)
    if config.budget_min > config.budget_max:
        raise ConfigError(f"--kv-budget-min {config.budget_min:g} is above --kv-budget-max {config.budget_max:g}")
    return config


def _read_share(name: str, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise ConfigError(f"{name} must be a fraction in (0, 1], got {value!r}")
    return number


def _read_names(value: object) -> tuple[str, ...]:
    names = tuple(name.strip() for name in str(value).split(",") if name.strip())
    return () if names == ("none",) else names


def _read_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return str(value)


def _read_min_tokens(value: object) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if number < 0:
        raise ConfigError(f"--kv-min-tokens must be a whole number from 0, got {value!r}")
    return number


def _read_overcommit(value: object) -> float | None:
    if value == "auto":
        return None
    try:
        factor = float(str(value))
    except ValueError:
        factor = 0.0
    if not 1.0 <= factor <= 64.0:
        raise ConfigError(f"--kv-overcommit must be `auto` or a factor from 1 to 64, got {value!r}")
    return factor
