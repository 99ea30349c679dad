"""The first start of a model: what its layers and heads need is measured beside its users, where that takes minutes.

A thread of the process that serves HTTP asks its own server what `vlcache calibrate` asks, one prompt at a time, writes
the weights where the next start finds them, and hands them to the schedulers.  The process never waits for it.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from vlcache_sgl._version import __version__
from vlcache_sgl.config import ConfigError, KVBudget, KVConfig
from vlcache_sgl.policy import PolicyError
from vlcache_sgl.policy.choice import Choices
from vlcache_sgl.policy.custom_params import RequestParams
from vlcache_sgl.sglang_hooks.facades import ServerArgs
from vlcache_sgl.sglang_hooks.settings import config_of
from vlcache_sgl.sglang_hooks.weight_knobs import knobs_of
from vlcache_sgl.weights import ModelWeights, cache_file, checkpoint_folder, find_weights, model_key

if TYPE_CHECKING:
    from vlcache_sgl.evaluation.calibration import Shares

logger = logging.getLogger(__name__)

MAX_SECONDS = 180.0
"""What is estimated to take longer is left to `vlcache calibrate`."""
REQUEST_SECONDS = MAX_SECONDS
"""The longest that one request may take."""
READY_S = 120.0
"""After SGLang's warm-up, which some servers skip, until HTTP is answered."""
_POLL_S = 0.25
_TIMEOUT_S = 30.0
"""Seconds that requests may take which no model answers."""


@dataclass(frozen=True)
class OwnServer:
    """Where this process answers, and as whom it may ask itself."""

    url: str
    key: str | None
    """The key of ordinary requests."""
    admin_key: str | None
    """The key of requests that change settings."""
    verify: ssl.SSLContext | bool

    @classmethod
    def of(cls, server_args: ServerArgs) -> OwnServer:
        """As SGLang's own warm-up reaches it."""
        from sglang.srt.arg_groups.serving_hook import ssl_verify_of

        verify = ssl_verify_of(server_args)
        return cls(
            server_args.url(),
            server_args.api_key,
            server_args.admin_api_key or server_args.api_key,
            ssl.create_default_context(cafile=verify) if isinstance(verify, str) else bool(verify),
        )

    def http(self, key: str | None, timeout_s: float) -> httpx.Client:
        """A client that sends `key` along."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, verify=self.verify, timeout=timeout_s)


def start(_: object, server_args: ServerArgs, *__: Any, **___: Any) -> None:
    """After SGLang has found itself ready: measure, where the weights of the model are asked for and not known."""
    config = config_of(server_args)
    if config is None or not wants_weights(config, server_args.model_path):
        return
    if reason := objection(config, server_args):
        logger.warning("%s", not_measured(reason))
        return
    arguments = (config, OwnServer.of(server_args), server_args.model_path)
    threading.Thread(target=_run, args=arguments, name="vlcache-calibration", daemon=True).start()


def wants_weights(config: KVConfig, model: str) -> bool:
    """Whether weights would change what the server keeps, and none were found when it started."""
    default = Choices(config).default
    if config.weights != "auto" or not default.policy.reads_weights or default.budget.keeps_all:
        return False
    return find_weights("auto", model) is None


def objection(config: KVConfig, server_args: ServerArgs) -> str | None:
    """Why the server cannot measure its model; None: it can, as far as shows without asking it."""
    from vlcache_sgl.evaluation.calibration import BUDGET, POLICY, TOKENS

    if checkpoint_folder(server_args.model_path) is None:
        return f"the files of {server_args.model_path} are not on this machine"
    if int(server_args.tokenizer_worker_num or 1) > 1:
        return "several processes read requests (--tokenizer-worker-num)"
    try:
        Choices(config).select(RequestParams(POLICY, KVBudget(fraction=BUDGET), "off"), TOKENS)
    except (ConfigError, PolicyError) as error:
        return str(error)
    return None


def not_measured(reason: str) -> str:
    """The line of the log that says so."""
    return (
        f"KV cache: what the model's layers need was not measured: {reason}; `vlcache calibrate` measures it for later "
        "starts, --kv-weights off does without"
    )


def _run(config: KVConfig, server: OwnServer, model: str) -> None:
    from vlcache_sgl.evaluation.calibration import CalibrationError

    try:
        weights, path = _measure(config, server, model)
        weights.write(path)
        _hand_over(server, weights)
    except CalibrationError as error:
        logger.warning("%s", not_measured(str(error)))
    except (httpx.HTTPError, OSError) as error:  # the server has ended, or the cache folder cannot be written
        logger.warning("%s", not_measured(f"{type(error).__name__}: {error}"))
    else:
        logger.info("KV cache: measured what the model's layers need (weights %s): %s", weights.digest, path)


def _measure(config: KVConfig, server: OwnServer, model: str) -> tuple[ModelWeights, Path]:
    """The weights, and where they belong.

    Raises:
        CalibrationError: it cannot be done, or would take too long.
    """
    from vlcache_sgl.client.client import Client
    from vlcache_sgl.evaluation.calibration import PROMPTS, CalibrationError, asker, calibrate, kinds, samples

    folder = checkpoint_folder(model)
    assert folder is not None, "objection() has looked"
    key = model_key(folder)
    with server.http(server.key, _TIMEOUT_S) as http:
        asked = kinds(config.scope, _reads_images(http))
    prompts = list(samples(PROMPTS, asked))
    logger.info(
        "KV cache: first start of this model, measuring what its layers need with %d prompts (%s), one at a time, "
        "beside other requests",
        len(prompts),
        " and ".join(asked),
    )
    first = True

    def note(_: Shares, seconds: float) -> None:
        nonlocal first
        if not first:
            return
        first, estimate = False, seconds * len(prompts)
        if estimate > MAX_SECONDS:
            raise CalibrationError(f"a prompt took {seconds:.1f} s, all would take about {estimate / 60:.0f} min")
        logger.info("KV cache: a prompt took %.1f s, all will take about %.0f s", seconds, estimate)

    with server.http(server.key, REQUEST_SECONDS) as http:
        client = Client(f"{server.url}/v1", REQUEST_SECONDS, key=server.key, http=http)
        weights = calibrate(asker(client), prompts, key, note)
    measured = {**weights.measured, "command": "--kv-weights auto", "version": __version__}
    return replace(weights, measured=measured), cache_file(key)


def _reads_images(http: httpx.Client) -> bool:
    """What the server says of its model, once it answers."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            response = http.get("/model_info")
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)
            continue
        return bool(response.raise_for_status().json().get("has_image_understanding"))


def _hand_over(server: OwnServer, weights: ModelWeights) -> None:
    """Let the schedulers use `weights` for requests that come from now on.

    Raises:
        CalibrationError: a scheduler refused them.
    """
    from vlcache_sgl.evaluation.calibration import CalibrationError

    with server.http(server.admin_key, REQUEST_SECONDS) as http:
        reply = http.post("/set_internal_state", json={"server_args": knobs_of(weights)})
    if not all(reply.raise_for_status().json()):
        raise CalibrationError("a scheduler refused the weights")
