"""The name that a misspelt one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CUTOFF = 0.7
"""Similarity (difflib's ratio) below which nothing is proposed: `tova` and `nova` are 0.75 alike."""


def nearest(name: str, choices: Iterable[str], cutoff: float = CUTOFF) -> str | None:
    """The choice that is most like `name`, letter case, `-` and `_` apart; None when none is.

    >>> nearest("VL-Cache", ["vlcache", "snapkv"]), nearest("mirror", ["vlcache"])
    ('vlcache', None)
    """
    plain = {_plain(choice): choice for choice in choices}
    found = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=cutoff)
    return plain[found[0]] if found else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """For a message, behind the wrong name; empty when nothing is near.

    >>> did_you_mean("vl-cache", ["vlcache"])
    " (did you mean 'vlcache'?)"
    """
    found = nearest(name, choices)
    return f" (did you mean {found!r}?)" if found is not None else ""


def _plain(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "")
