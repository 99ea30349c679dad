"""What a request that shares without loss holds for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import torch


@dataclass
class OwnSlots:
    """What a request's row of `req_to_token` names while it decodes, and what it named before."""

    shared: torch.Tensor
    """`[length]` int64, slots of the prompt that the prefix tree owns or will own."""
    private: torch.Tensor
    """`[length]` int64, slots of what this request keeps."""


@dataclass
class HostShare:
    """How far a request that shares without loss has come."""

    first_row: int
    """Position of the policy's first query row: a prefix hit ends there, because rows of a hit are not computed."""
    ratio: float
    """Share of the prompt that has cells at most, in (0, 1], what is recalled included: what admission counts on."""
    abort: Callable[[str, HTTPStatus], None]
    """Ends the request with a message and a status."""
    own: OwnSlots | None = None
    """Set from the end of the prefill to the moment when the prompt is published."""
    detached: bool = False
    """Whether the prompt has been published: its request relies on its own slots only, as one that shares nothing."""
    unwritten: bool = False
    """Whether some of the prompt did not fit host memory: then nothing of it is published."""

    @property
    def settled(self) -> bool:
        """Whether the request has slots of its own."""
        return self.own is not None or self.detached

    def restart(self) -> None:
        """Begin anew after a retraction, which has taken everything back."""
        self.own, self.unwritten, self.detached = None, False, False
