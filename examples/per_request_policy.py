"""Let every request choose its policy and budget: `python examples/per_request_policy.py [--url URL]`.

The choice travels in `custom_params`, through the OpenAI client (`extra_body`) and in native requests
(`sampling_params`).  With `return_meta_info` the OpenAI response says what was done; native responses always do.
"""

from __future__ import annotations

from typing import Any

import httpx
import openai
from picture import data_url, draw, server_url

CHOICES: tuple[dict[str, Any], ...] = (
    {},  # the server's own
    {"kv_budget": 0.3},
    {"kv_policy": "snapkv:window=64", "kv_budget": 0.2},
    {"kv_policy": "scorer=vlcache,allocator=pyramid,sink=4", "kv_budget": 100},  # tokens per layer, on average
    {"kv_budget": 1.0},  # not compressed
)


def main() -> None:
    url = server_url()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    drawn = draw(8)
    question = drawn.questions[0]
    image = {"type": "image_url", "image_url": {"url": data_url(drawn.image)}}

    def ask(params: dict[str, Any]) -> Any:
        return client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": [image, {"type": "text", "text": question.text}]}],
            max_tokens=8,
            temperature=0,
            extra_body={"custom_params": params, "return_meta_info": True},
        )

    print(f"{question.text} expected: {question.answer}\n")
    for params in CHOICES:
        choice = ask(params).choices[0]
        (report,) = choice.meta_info["kv_compression"]
        print(f"{params}\n  answer: {choice.message.content}\n  {report}")

    print(f"\n{CHOICES[2]} through /generate, which shares what the request above has stored:")
    prompt = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question.text}<|im_end|>\n"
    body = {
        "text": prompt + "<|im_start|>assistant\n",
        "image_data": [data_url(drawn.image)],
        "sampling_params": {"max_new_tokens": 8, "temperature": 0, "custom_params": CHOICES[2]},
    }
    answer = httpx.post(f"{url}/generate", json=body, timeout=120).json()
    meta = answer["meta_info"]
    print(
        f"  answer: {answer['text']}; {meta['cached_tokens']} of {meta['prompt_tokens']} prompt tokens from the cache"
    )
    print(f"  {meta['kv_compression'][0]}")

    print("\nWhat does not exist is refused:")
    try:
        ask({"kv_policy": "snapvk"})
    except openai.BadRequestError as error:
        print(f"  {error.status_code}: {error.body['message']}")


if __name__ == "__main__":
    main()
