"""Ask a compressed server several questions about one image: `python examples/quickstart.py [--url URL]`.

Start the server first:

    sglang serve --model-path models/tinyvlm/grounded --kv-policy vlcache --kv-budget 0.1

Each question's prompt is compressed to a tenth.  The later ones find the image in the cache, all of it, and keep of it
what they need.
"""

from __future__ import annotations

import openai
from picture import data_url, draw, server_url


def main() -> None:
    client = openai.OpenAI(base_url=f"{server_url()}/v1", api_key="none")
    drawn = draw()
    image = {"type": "image_url", "image_url": {"url": data_url(drawn.image)}}
    for question in drawn.questions[:3]:
        reply = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": [image, {"type": "text", "text": question.text}]}],
            max_tokens=8,
            temperature=0,
            extra_body={"return_meta_info": True},  # `usage` names cached tokens with --enable-cache-report only
        )
        meta = reply.choices[0].meta_info
        print(
            f"{question.text:50} {reply.choices[0].message.content:6} (expected {question.answer}); "
            f"{meta['cached_tokens']} of {meta['prompt_tokens']} prompt tokens from the cache"
        )


if __name__ == "__main__":
    main()
