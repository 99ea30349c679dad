"""A thousand bodies that nobody should send in `custom_params`: a 4xx or an answer each, never a 5xx, nothing lost."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlcache_sgl.client.client import data_url

BODIES = 1000
OURS = r"kv_policy|kv_budget|kv_report|kv_share|policy|scorer|allocator|selection"
"""In the messages of what we refuse; SGLang's own are about JSON and types."""
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", " ", "nan", "inf", "-inf", "1e999", "0x10", "\ud800", "\0", "a" * 100_000, "\uff19", "0.1\n"]),
)
numbers = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2, 2**31, 2**63, 2**64, 10**400, True, 1e308, 5e-324, float("nan"), float("inf")]),
    st.floats(),
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
NAMES = [
    "vlcache",
    "snapkv",
    "h2o",
    "chunkkv",
    "table",
    "scorer",
    "allocator",
    "uniform",
    "pyramidkv",
    "random",
    "paper",
]
KEYS = ["window", "sink", "protect", "file", "seed", "kernel", "heads", "scorer.window", "selection.sink", "p", "chunk"]
values = st.one_of(numbers.map(str), texts, st.sampled_from([*NAMES, "none", "true", "split", "vision"]))
settings_text = st.lists(st.tuples(st.sampled_from(KEYS), values).map("=".join), min_size=1, max_size=3).map(",".join)
policies = st.one_of(
    st.tuples(st.sampled_from(NAMES), settings_text).map(":".join),
    st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES), settings_text).map(
        lambda parts: f"scorer={parts[0]},allocator={parts[1]},{parts[2]}"
    ),
    st.sampled_from(NAMES),
    st.text(alphabet="abvlcache:=,.-_ \n{}", max_size=60),
)
parameters = st.fixed_dictionaries(
    {},
    optional={
        "kv_policy": st.one_of(policies, anything),
        "kv_budget": st.one_of(numbers, anything),
        "kv_report": st.one_of(st.sampled_from(["summary", "positions", "attention"]), anything),
        "kv_share": st.one_of(st.sampled_from(["exact", "policy", "off"]), anything),
        "kv_unknown": anything,
        "__class__": anything,
    },
)
deep: Any = []
for _ in range(400):
    deep = [deep]
custom_params = st.one_of(parameters, parameters, parameters, anything, st.just({"kv_budget": deep}), st.just(deep))


def test_malformed_custom_params(ours_tenth: Any, picture: Any) -> None:
    server = ours_tenth
    server.flush()
    image = data_url(picture(8200, 12, 12).image)
    seen: dict[int, int] = {}
    sent = ours = 0

    with httpx.Client(base_url=server.url, timeout=120) as http:

        @settings(
            max_examples=BODIES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(params=custom_params, with_image=st.sampled_from([False] * 4 + [True]))
        def send(params: Any, with_image: bool) -> None:
            nonlocal sent, ours
            sent += 1
            sampling = {"max_new_tokens": 1, "temperature": 0.0, "custom_params": params}
            body: dict[str, Any] = {"text": "red K?", "sampling_params": sampling}
            if with_image:
                # A key of its own: the image is computed and compressed, not found in the prefix cache.
                prompt = f"<|im_start|>user\n{IMAGE}red K?<|im_end|>\n<|im_start|>assistant\n"
                body |= {"text": prompt, "image_data": [image], "extra_key": str(sent)}
            reply = http.post("/generate", content=json.dumps(body), headers={"content-type": "application/json"})
            seen[reply.status_code] = seen.get(reply.status_code, 0) + 1
            ours += reply.status_code == 400 and re.search(OURS, reply.text) is not None
            assert reply.status_code < 500, (params, reply.text[:300])
            assert len(reply.content) < 20_000, params

        send()

    assert sent >= BODIES
    assert seen.get(200, 0) > BODIES // 20, f"hardly any of them was served: {seen}"
    assert ours > BODIES // 5, f"SGLang refused most of them before we saw any: {ours} of {seen}"
    server.flush()
    state = server.settled()
    assert state["cells_used"] == 0
    assert state["integrity"] == []
    server.assert_alive()
    print(f"{sent} bodies: {seen}, {ours} of them refused by us")
