"""Programs that people point at a server: OpenAI's client and SGLang's benchmark.  SGLang's frontend language and
`sgl.Engine` are in test_examples.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from vlcache_sgl.client.client import data_url

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("source", ["base64", "file"])
def test_openai_client(ours_tenth: Any, picture: Any, tmp_path: Path, source: str, stream: bool) -> None:
    """Nothing but the client's own calls; the answer is right and the image was compressed."""
    server, drawn = ours_tenth, picture(8200 + 2 * (source == "file") + stream, 24, 24)
    server.flush()
    drawn.image.save(tmp_path / "picture.png")
    url = data_url(drawn.image) if source == "base64" else f"file://{tmp_path}/picture.png"
    question = drawn.questions[0]
    before = server.settled()
    client = openai.OpenAI(base_url=server.process.openai_url, api_key="none", max_retries=0)
    reply = client.chat.completions.create(
        model="default",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": question.text},
                ],
            }
        ],
        max_tokens=8,
        temperature=0.0,
        stream=stream,
        # What this model was trained to survive at a tenth.
        extra_body={"custom_params": {"kv_policy": "vlcache:density"}},
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in reply if chunk.choices)
    else:
        text = reply.choices[0].message.content
    assert text.strip() == question.answer
    after = server.settled()
    assert after["requests_compressed"] == before["requests_compressed"] + 1
    assert after["vision_seen_by_layer"][0] - (before["vision_seen_by_layer"] or [0])[0] == drawn.num_image_tokens


@pytest.mark.parametrize("backend", ["sglang-oai-chat", pytest.param("sglang", marks=pytest.mark.slow)])
def test_benchmark_of_sglang(ours_tenth: Any, tmp_path: Path, backend: str) -> None:
    """`sglang.bench_serving` with random images: all requests complete, all prompts are compressed.

    Its random text is short and always the same: from so small a vocabulary it may draw the token of a video, which
    SGLang then misses.
    """
    server, out = ours_tenth, tmp_path / "bench.jsonl"
    server.flush()
    before = server.settled()
    command = [
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", backend, "--base-url", server.url),
        *("--model", str(ROOT / "models/tinyvlm/grounded"), "--dataset-name", "image", "--image-count", "2"),
        *("--image-resolution", "420x560", "--image-format", "png", "--num-prompts", "4", "--request-rate", "inf"),
        *("--random-input-len", "8", "--random-output-len", "8", "--random-range-ratio", "1.0"),
        *("--warmup-requests", "0", "--disable-tqdm", "--output-file", str(out)),
    ]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    result = json.loads(out.read_text().splitlines()[-1])
    assert result["completed"] == 4
    after = server.settled()
    assert after["requests_compressed"] == before["requests_compressed"] + 4
    assert after["policy_failures"] == before["policy_failures"]
    server.assert_alive()
