"""Weights of the model that change while it serves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.io_struct import SetInternalStateReqOutput

from vlcache_sgl.policy.choice import Choices
from vlcache_sgl.sglang_hooks.facades import StateRequest
from vlcache_sgl.sglang_hooks.status import Status
from vlcache_sgl.sglang_hooks.weight_knobs import are_knobs, weights_of

logger = logging.getLogger(__name__)


class WeightChange:
    """Takes weights that arrive as numbers of SGLang's internal state.

    Args:
        choices: use them for requests that come later.
        status: is told that something has happened.
    """

    def __init__(self, choices: Choices, status: Status) -> None:
        self._choices = choices
        self._status = status

    def set_internal_state(self, original: Callable[..., Any], controller: Any, request: StateRequest) -> Any:
        """Around the change of SGLang's settings while it serves: weights of the model may be among them.

        Requests that were admitted before keep what they were admitted with, and the prefixes that they leave.
        """
        if not are_knobs(request.server_args):
            return original(controller, request)
        try:
            weights = weights_of(request.server_args)
            self._choices.use_weights(weights)
        except ValueError as error:
            logger.warning("KV cache: model weights that cannot be used: %s", error)
            return SetInternalStateReqOutput(updated=False)
        self._status.note_change()
        logger.info("KV cache: model weights from now on: %s", weights.digest)
        return SetInternalStateReqOutput(updated=True)
