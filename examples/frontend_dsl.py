"""SGLang's frontend language with a policy per program run: `python examples/frontend_dsl.py [--url URL]`.

The language has no parameter for what only some servers understand, so the choice belongs to the endpoint that a
program runs on: `PolicyEndpoint` puts it into every request.  Endpoints cost nothing; make one per choice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sglang as sgl
from picture import draw, server_url
from PIL import Image
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.chat_template import get_chat_template


class PolicyEndpoint(RuntimeEndpoint):
    """A server, and the `custom_params` of all requests that a program sends to it."""

    def __init__(self, url: str, **custom_params: Any) -> None:
        super().__init__(url)
        self.custom_params = custom_params
        # Qwen's tokens; the bundled model was trained without a system prompt.
        self.chat_template = dataclasses.replace(get_chat_template("qwen2-vl"), default_system_prompt=None)

    def _add_images(self, s: Any, data: dict[str, Any]) -> None:
        """Called for the body of every request that belongs to a program: `gen`, `select`, and what `fork` sends."""
        super()._add_images(s, data)
        data["sampling_params"]["custom_params"] = self.custom_params


@sgl.function
def read(s: Any, image: Image.Image, question: str) -> None:
    """One question."""
    s += sgl.user(sgl.image(image) + question)
    s += sgl.assistant(sgl.gen("code", max_tokens=8, temperature=0.0))


@sgl.function
def choose(s: Any, image: Image.Image, question: str, codes: list[str]) -> None:
    """One question with given answers: they are compared on one compressed image."""
    s += sgl.user(sgl.image(image) + question)
    s += sgl.assistant(sgl.select("code", codes))


@sgl.function
def read_all(s: Any, image: Image.Image, questions: list[str]) -> None:
    """Questions side by side: `fork` prefills the image alone, all branches share it."""
    s += sgl.user_begin() + sgl.image(image)
    s.sync()  # A program runs in a thread of its own; `fork` prefills what it has got when asked.
    branches = s.fork(len(questions))
    for branch, question in zip(branches, questions, strict=True):
        branch += question + sgl.user_end()
        branch += sgl.assistant(sgl.gen("code", max_tokens=8, temperature=0.0))
    s["codes"] = [branch["code"] for branch in branches]


def main() -> None:
    url, drawn = server_url(), draw(9)
    questions = [question.text for question in drawn.questions]
    codes = [question.answer for question in drawn.questions]

    tenth = PolicyEndpoint(url, kv_policy="vlcache", kv_budget=0.1)
    state = read.run(drawn.image, questions[0], backend=tenth)
    print(f"read, vlcache at 0.1: {state['code']} (expected {codes[0]})")
    print(f"  {state.get_meta_info('code')['kv_compression'][0]}")

    fifth = PolicyEndpoint(url, kv_policy="snapkv", kv_budget=0.2)
    state = choose.run(drawn.image, questions[1], codes, backend=fifth)
    print(f"choose, snapkv at 0.2: {state['code']} of {codes} (expected {codes[1]})")

    # `fork` prefills the image before any question is known.  Its branches find all of it, and select for themselves.
    for params in ({"kv_policy": "vlcache", "kv_budget": 0.2}, {"kv_budget": 1.0}):
        state = read_all.run(drawn.image, questions, backend=PolicyEndpoint(url, **params))
        print(f"read_all, {params}: {state['codes']} (expected {codes})")


if __name__ == "__main__":
    main()
