"""How probable the right answer is behind a compressed prompt, whatever the model would have said: teacher forcing.

Two requests to SGLang's `/generate` for each question, both with the policy and budget of the condition:

1. The prompt alone, one token of output.  Its prefill compresses the prompt and publishes it in the prefix cache; the
   server is asked for the log-probability of the answer's first token, which comes from that prefill as in any answer.
2. The prompt and the answer.  The prompt is found whole, so only the answer's tokens are computed: they attend to what
   is kept of the prompt and to each other, as decoded tokens do.  They are no query rows: scoring is over.

The sum is what greedy decoding reports for these tokens, had it chosen them.

Where prefixes are shared without loss, an answer is the one of a question asked alone, and the second request would
select anew.  There both share what the first has compressed (`kv_share: policy`), in a namespace of their own.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx

from vlcache_sgl.client.client import user_says
from vlcache_sgl.client.server import RunningServer


class NotMeasured(RuntimeError):
    """The figure would not be that of the compressed prompt; the message says why."""


@dataclass(frozen=True)
class Forced:
    """An answer that was forced behind a prompt."""

    logprob: float
    """Natural logarithm of the probability of all its tokens, without an end of the text."""
    tokens: int


class Forcing:
    """Forces answers on one server.  Threads may share it."""

    def __init__(self, url: str, timeout_s: float = 300.0) -> None:
        """`url`: without `/v1`."""
        self._http = httpx.Client(base_url=url, timeout=timeout_s)
        self._server = RunningServer(url)

    @cached_property
    def _share(self) -> str | None:
        """How the server shares prefixes of requests that do not say; None: it compresses nothing."""
        share: str | None = self._server.kv_policy().get("share")
        return share

    def __call__(
        self, question: str, images: Sequence[str], answer: str, custom_params: Mapping[str, Any], salt: str
    ) -> Forced:
        """The log-probability of `answer` as the reply to a question about the images.

        Args:
            images: URLs.
            salt: separates prefixes; with `kv_share` `policy` requests of the same salt share what the first has
                compressed.

        Raises:
            NotMeasured: the prompt was not shared or not found whole, or the answer has no tokens.
            httpx.HTTPError: the server refuses a request.
        """
        prompt = self._post("/v1/tokenize", {"messages": [user_says(question, *images)]})["tokens"]
        forced = self._post("/v1/tokenize", {"prompt": answer, "add_special_tokens": False})["tokens"]
        if not forced:
            raise NotMeasured(f"the answer {answer!r} has no tokens")
        params = dict(custom_params)
        if params.get("kv_share", self._share) == "exact":
            params["kv_share"], salt = "policy", f"{salt}-{uuid.uuid4().hex}"
        common: dict[str, Any] = {
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 1, "custom_params": params},
            "extra_key": salt,
            "return_logprob": True,
            "return_prompt_token_ids": True,
        }
        if images:
            common["image_data"] = list(images)
        first = self._post("/generate", {**common, "input_ids": prompt, "token_ids_logprob": forced[:1]})
        ((first_logprob, *_),) = first["meta_info"]["output_token_ids_logprobs"][0]
        if len(forced) == 1:
            return Forced(first_logprob, 1)
        expanded = first["prompt_token_ids"]  # an image has as many tokens there as in the model
        second = self._post("/generate", {**common, "input_ids": prompt + forced, "logprob_start_len": len(expanded)})
        if second["prompt_token_ids"] != expanded + forced:
            raise NotMeasured("behind this prompt the answer has other tokens than alone")
        if (found := second["meta_info"]["cached_tokens"]) != len(expanded):
            raise NotMeasured(f"{found} of the prompt's {len(expanded)} tokens were found in the prefix cache")
        # The first entry is the answer's first token, whose row is not there: it has no probability.
        _, *rest = second["meta_info"]["input_token_logprobs"]
        assert [token for _, token, *_ in rest] == forced[1:]
        return Forced(first_logprob + sum(logprob for logprob, *_ in rest), len(forced))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        reply = self._http.post(path, json=body)
        if reply.is_error:
            raise httpx.HTTPStatusError(_said(reply), request=reply.request, response=reply)
        return reply.json()


def _said(reply: httpx.Response) -> str:
    """What the server said when it refused."""
    try:
        said = reply.json()
        return str(said.get("message") or said["error"]["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{reply.status_code} {reply.reason_phrase}"
