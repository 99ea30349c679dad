"""SGLang in this process, without a server: `python examples/engine.py [--model-path PATH]`.

`sgl.Engine` takes the flags of `sglang serve` as arguments, ours too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sglang as sgl
from picture import data_url, draw

BUNDLED = Path(__file__).parents[1] / "models/tinyvlm/grounded"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", default=str(BUNDLED))
    model_path = parser.parse_args().model_path

    engine = sgl.Engine(
        model_path=model_path,
        kv_policy="vlcache",
        kv_budget=0.1,
        dtype="float32",
        max_total_tokens=16384,
        log_level="warning",
    )
    try:
        drawn = draw()
        for question in drawn.questions[:2]:
            prompt = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question.text}<|im_end|>\n"
            answer = engine.generate(
                prompt + "<|im_start|>assistant\n",
                image_data=[data_url(drawn.image)],
                sampling_params={"max_new_tokens": 8, "temperature": 0.0},
            )
            meta = answer["meta_info"]
            print(f"{question.text} {answer['text']} (expected {question.answer})")
            print(f"  {meta['cached_tokens']} of {meta['prompt_tokens']} tokens cached; {meta['kv_compression'][0]}")
    finally:
        engine.shutdown()


if __name__ == "__main__":  # the engine starts processes that import this file
    main()
