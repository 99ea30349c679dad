"""What a request asks for: `custom_params`, read into one frozen object.

The process that reads requests and the scheduler both call `RequestParams.read`; nobody else looks at `custom_params`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vlcache_sgl.config import RECALL, ConfigError, KVBudget, Share, shown

PREFIX = "kv_"
"""Begins every name that is ours; all others in `custom_params` are SGLang's and its logit processors'."""
KEYS = ("kv_policy", "kv_budget", "kv_share", "kv_recall", "kv_report")
"""All that a request may say."""
Report = Literal["summary", "positions", "attention"]
MAX_SPEC_LENGTH = 512
"""Characters of a `kv_policy`: it is remembered, and quoted in messages."""


@dataclass(frozen=True)
class RequestParams:
    """Syntax only: whether a server serves it is `Choices.select`'s to say.  None: the server's default."""

    policy: str | None = None
    budget: KVBudget | None = None
    share: Share | None = None
    recall: int | None = None
    """Evicted tokens that each layer gets back in each decode step; 0: none."""
    report: Report = "summary"
    """What the response is to say of this request."""

    @classmethod
    def read(cls, custom_params: object) -> RequestParams:
        """`custom_params` as the client sent them, which may be anything.

        Raises:
            ConfigError: for anything that is not understood; the message is for the client.
        """
        if custom_params is None:
            return cls()
        if not isinstance(custom_params, Mapping):
            raise ConfigError(f"custom_params must be an object with names and values, got {shown(custom_params)}")
        if unknown := ours(custom_params, known=KEYS):
            raise ConfigError(f"custom_params has no {shown(unknown[0])}{nearest(unknown[0])}")
        given: dict[str, Any] = {key.removeprefix(PREFIX): custom_params[key] for key in KEYS if key in custom_params}
        if not isinstance(given.get("policy", ""), str):
            raise ConfigError(f"kv_policy must be a text, got {shown(given['policy'])}")
        if "budget" in given:
            given["budget"] = KVBudget.parse(given["budget"], "kv_budget")
        if "recall" in given:
            try:
                given["recall"] = RECALL.read(given["recall"])
            except (ValueError, TypeError, OverflowError):
                raise ConfigError(f"kv_recall must be {RECALL.words}, got {shown(given['recall'])}") from None
        for name, choices in (("share", get_args(Share)), ("report", get_args(Report))):
            if name in given and given[name] not in choices:
                raise ConfigError(f"{PREFIX}{name} must be one of: {', '.join(choices)}, got {shown(given[name])}")
        return cls(**given)


def ours(names: Iterable[object], known: Iterable[str] = ()) -> list[str]:
    """Those of `names` that begin as ours do and are not `known`."""
    return [name for name in names if isinstance(name, str) and name.startswith(PREFIX) and name not in known]


def nearest(name: str) -> str:
    """Ends a message about a name that is not known: the one that was probably meant, and all that there are."""
    # What all begin with says nothing.  Bounded: comparing takes time in proportion to the product of the lengths.
    own = [key.removeprefix(PREFIX) for key in KEYS]
    close = difflib.get_close_matches(name.removeprefix(PREFIX)[:64], own, n=1)
    return f"{f': did you mean {PREFIX}{close[0]}?' if close else ';'} choose from: {', '.join(KEYS)}"


def misplaced(body: object, request: object, reads: bool = False) -> str | None:
    """What is wrong with where the body of an HTTP request says something to us; None: nothing.

    SGLang ignores fields that it does not know, and some of its endpoints do not read `custom_params`.

    Args:
        body: parsed JSON.
        request: what SGLang has made of it; its attributes are the fields that the endpoint reads.
        reads: the endpoint reads `custom_params` although `request` does not have them.
    """
    if not isinstance(body, Mapping):
        return None
    where = "sampling_params.custom_params" if hasattr(request, "sampling_params") else "custom_params"
    in_request = hasattr(request, "custom_params")
    reads = reads or in_request or hasattr(request, "sampling_params")
    for name in ours(body):
        if not hasattr(request, name):
            place = f"{shown(name)} belongs into {where}" if reads else f"this endpoint does not read {shown(name)}"
            return place if name in KEYS else f"there is no {shown(name)}{nearest(name)} (in {where})"
    params = body.get("custom_params")
    if in_request or not isinstance(params, Mapping) or not ours(params):
        return None
    names = shown(", ".join(ours(params)))
    if hasattr(request, "sampling_params"):
        return f"custom_params with {names} belongs into sampling_params"
    return None if reads else f"this endpoint does not read custom_params ({names}): those that generate text do"
