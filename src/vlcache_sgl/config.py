"""The plugin's settings: parsed once from flags, frozen, handed down whole."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from vlcache_sgl.spelling import did_you_mean

Scope = Literal["vision", "all"]
HostSize = int | Literal["auto", "off"]
"""Bytes of host memory per rank."""
Share = Literal["exact", "policy", "off"]

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
    WORDS: ClassVar[str] = "a fraction in (0, 1] or a whole number of tokens per layer"
    """What `parse` accepts."""

    @classmethod
    def parse(cls, value: object, name: str = "--kv-budget") -> KVBudget:
        """Read ``0.1``, ``"0.1"`` or ``64``; integers above 1 (and texts without a point) are tokens per layer.

        Raises:
            ConfigError: when the value is neither.
        """
        problem = ConfigError(f"{name} must be {cls.WORDS}, got {shown(value)}")
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
    budget: KVBudget = field(default_factory=lambda: KVBudget(fraction=0.2))
    """The smallest share at which the flagship loses no answers of the pretrained judge (docs/fidelity.md)."""
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
    weights: str = "auto"
    """What layers and heads of the model need: a file, ``auto`` (what was measured of this model, if need be on this
    start) or ``off``."""
    host_memory: HostSize = "auto"
    """Memory beside the KV pool in which every token of a compressed prompt lies whole, per rank."""
    share: Share = "exact"
    """What other requests find of a compressed prefix: all of it, in host memory (``exact``), what the first one's
    policy kept (``policy``), or nothing (``off``)."""

    recall: int = 0
    """Evicted tokens that each layer gets back from host memory in each decode step; 0: none."""

    @property
    def wants_host_memory(self) -> bool:
        """Whether there is to be host memory: ``auto`` is for servers that share without loss."""
        return self.host_memory != "off" and (self.host_memory != "auto" or self.share == "exact")

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


# -- flags ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """What a flag accepts: its help, its error message and its parser say the same because they are this object."""

    words: str
    """For instance ``a fraction in (0, 1]``."""
    read: Callable[[object], Any]
    """The value of a text or of an already typed value; raises ValueError for what `words` does not describe."""
    metavar: str


def fraction(*, below_one: bool = False) -> Values:
    """Shares; 0 is none, and 1 is one unless `below_one`."""

    def read(value: object) -> float:
        number = float(str(value))
        if not 0 < number <= 1 or (below_one and number == 1):
            raise ValueError(value)
        return number

    return Values(f"a fraction in (0, 1{')' if below_one else ']'}", read, "SHARE")


def whole(low: int, metavar: str) -> Values:
    """Whole numbers from `low`."""

    def read(value: object) -> int:
        number = int(str(value))
        if number < low:
            raise ValueError(value)
        return number

    return Values(f"a whole number from {low}", read, metavar)


def factor_or_auto(low: float, high: float) -> Values:
    """``auto``, read as None, or a factor within the bounds."""

    def read(value: object) -> float | None:
        if value == "auto":
            return None
        number = float(str(value))
        if not low <= number <= high:
            raise ValueError(value)
        return number

    return Values(f"`auto` or a factor from {low:g} to {high:g}", read, "FACTOR")


def one_of(choices: tuple[str, ...]) -> Values:
    """Fixed words."""

    def read(value: object) -> str:
        if value not in choices:
            raise ValueError(value)
        return str(value)

    return Values(f"one of {', '.join(choices)}", read, "|".join(choices))


def _read_text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(value)
    return value.strip()


def _read_names(value: object) -> tuple[str, ...]:
    names = tuple(name.strip() for name in _read_text(value).split(","))
    if not all(names) or (len(names) > 1 and {"*", "none"} & set(names)):
        raise ValueError(value)
    return () if names == ("none",) else names


def _read_switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


MAX_RECALL = 2**20
"""Tokens; no prompt has more."""


def _read_size(value: object) -> HostSize:
    if value in ("auto", "off"):
        return "auto" if value == "auto" else "off"
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not size:
        raise ValueError(value)
    return size


def _read_recall(value: object) -> int:
    if value == "off":
        return 0
    number = int(str(value))
    if isinstance(value, bool) or not 0 <= number <= MAX_RECALL:
        raise ValueError(value)
    return number


RECALL = Values("`off` or a whole number of tokens", _read_recall, "off|TOKENS")
"""Of `--kv-recall`, and of a request's `kv_recall`."""
SWITCH = Values("true or false", _read_switch, "")
POLICY = Values("NAME[:key=value,...] or scorer=A,allocator=B[,key=value,...]", _read_text, "POLICY")
NAMES = Values("names with commas between them, or `*` for all, or `none`", _read_names, "NAMES")


def _never(config: KVConfig) -> str | None:
    return None


@dataclass(frozen=True)
class Flag:
    """One setting: argparse, the keywords of `sgl.Engine` and the table in README follow from this record."""

    name: str
    """As on the command line."""
    values: Values
    help: str
    """What it does, in a sentence that ends without a full stop; values and default are added."""
    default_words: str | None = None
    """The default, where it is not what a user would type."""
    objection: Callable[[KVConfig], str | None] = _never
    """Why this flag, when given, contradicts another setting or does nothing; follows ``--flag value`` in the message.
    None: it has an effect."""

    @property
    def dest(self) -> str:
        """The keyword of `sgl.Engine`."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def field(self) -> str:
        """The field of `KVConfig` that holds the value."""
        return self.dest.removeprefix("kv_")

    @property
    def switch(self) -> bool:
        return self.values is SWITCH

    @property
    def default(self) -> str:
        """For people: what holds when the flag is not given."""
        if self.default_words is not None:
            return self.default_words
        value = getattr(_DEFAULTS, self.field)
        return f"{value:g}" if isinstance(value, float) else str(value)

    @property
    def explained(self) -> str:
        """The help text whole."""
        accepted = "" if self.switch else f": {self.values.words}"
        return f"{self.help}{accepted}. Default: {self.default}."

    def is_given(self, value: object) -> bool:
        """Whether `value`, None or a switch that is off, is something that a user has said."""
        return value is not None and not (self.switch and value is False)

    def read(self, value: object) -> Any:
        """Raises `ConfigError` for what the flag does not accept."""
        try:
            return self.values.read(value)
        except (ValueError, TypeError, OverflowError):
            meant = did_you_mean(str(value), self.values.metavar.split("|")) if "|" in self.values.metavar else ""
            raise ConfigError(f"{self.name} must be {self.values.words}, got {shown(value)}{meant}") from None


_DEFAULTS = KVConfig("")


def _object_to_least(config: KVConfig) -> str | None:
    if config.budget_min > config.budget_max:
        return f"is above --kv-budget-max {config.budget_max:g}"
    if config.budget.fraction is not None and config.budget_min > config.budget.fraction:
        return f"is above --kv-budget {config.budget}, what a prompt keeps by default"
    return None


def _object_to_most(config: KVConfig) -> str | None:
    if config.budget.fraction is not None and config.budget_max < config.budget.fraction:
        return f"is below --kv-budget {config.budget}, what a prompt keeps by default"
    return None


def _object_to_share(config: KVConfig) -> str | None:
    return "needs host memory" if config.share == "exact" and config.host_memory == "off" else None


def _object_to_recall(config: KVConfig) -> str | None:
    if not config.recall:
        return None
    if not config.wants_host_memory:
        return "needs host memory"
    return None if config.share == "exact" else f"needs --kv-share exact, and it is {config.share}"


FLAGS: tuple[Flag, ...] = (
    Flag(
        "--kv-policy",
        POLICY,
        "Compress the KV cache of prompts with this policy, one of those that `vlcache policies` lists",
        "none, nothing is compressed",
    ),
    Flag("--kv-budget", Values(KVBudget.WORDS, KVBudget.parse, "BUDGET"), "What stays of a prompt"),
    Flag("--kv-scope", one_of(get_args(Scope)), "Whether prompts with images or videos are compressed, or all"),
    Flag("--kv-min-tokens", whole(0, "TOKENS"), "Prompts with fewer new tokens (after a prefix hit) are left alone"),
    Flag(
        "--kv-overcommit",
        factor_or_auto(1.0, 64.0),
        "Virtual token slots per physical token, from the budget unless it is said",
        "auto",
    ),
    Flag(
        "--kv-head-cells",
        SWITCH,
        "Account KV memory per KV head, so that policies with heads=split may keep different tokens per head",
        "off",
    ),
    Flag(
        "--kv-budget-min", fraction(), "Least share of a prompt that a request may ask to keep", None, _object_to_least
    ),
    Flag("--kv-budget-max", fraction(), "Largest share that a request may ask to keep", None, _object_to_most),
    Flag("--kv-allow-policies", NAMES, "Policies that a request may choose beside the server's own", "*"),
    Flag(
        "--kv-weights",
        Values("`auto`, `off` or the path of a file", _read_text, "auto|off|FILE"),
        "What each layer and KV head of the model needs, measured by `vlcache calibrate`; `auto` takes what was "
        "measured of this model before, and measures on its first start",
    ),
    Flag(
        "--kv-host-memory",
        Values("`auto`, `off` or a size such as 8GB", _read_size, "auto|off|SIZE"),
        "Host memory per rank in which every token of a compressed prompt lies whole, so that later questions see all "
        "of it; `auto` is twice the KV pool, and at most a quarter of what is free",
    ),
    Flag(
        "--kv-share",
        one_of(get_args(Share)),
        "What other requests find of a prompt's beginning: all of it, from host memory (`exact`), what the first "
        "request's policy kept (`policy`), nothing (`off`)",
        "exact with host memory, off without",
        _object_to_share,
    ),
    Flag(
        "--kv-recall",
        RECALL,
        "Evicted tokens that each layer gets back from host memory in each decode step, those that a sketch of their "
        "keys says the step needs most",
        "off",
        _object_to_recall,
    ),
)


def config_from(values: Mapping[str, Any]) -> KVConfig | None:
    """Settings from flag values (``{"kv_policy": ..., ...}``; None = not given); None when no policy is asked for.

    What can be said without knowing policies and model is checked here; `sglang_hooks.flags` checks the rest.

    Raises:
        ConfigError: with one line that names the flag.
    """
    given = {flag: values[flag.dest] for flag in FLAGS if flag.is_given(values.get(flag.dest))}
    if given and not any(flag.field == "policy" for flag in given):
        raise ConfigError(f"{', '.join(flag.name for flag in given)} needs --kv-policy")
    if not given:
        return None
    parsed = {flag.field: flag.read(value) for flag, value in given.items()}
    if parsed.get("host_memory") == "off":
        parsed.setdefault("share", "off")  # what one question kept answers others badly
    config = KVConfig(**parsed)
    for flag, value in given.items():
        if objection := flag.objection(config):
            raise ConfigError(f"{flag.name} {value} {objection}")
    return config
