"""Models with layers that see the last tokens only, on CPU servers with tiny random weights.

Stock SGLang keeps all tokens of these layers and masks; ours keeps the last ones.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.models.make_tiny import make_tiny

pytestmark = pytest.mark.slow

COUNTED, SLIDING, WINDOW = 2, 2, 63
"""Layers of each kind, and tokens before its own that a token sees in the latter."""
IMAGE_TOKENS = 64
COMMON = (
    *("--dtype", "float32", "--chunked-prefill-size", "128", "--max-total-tokens", "16384"),
    *("--max-running-requests", "8", "--enable-cache-report", "--skip-server-warmup", "--sleep-on-idle"),
    "--enable-multimodal",
)
TENTH = ("--kv-policy", "vlcache", "--kv-budget", "0.1")
TEXT = "Which code is printed after the green letter T? " * 12
"""With an image three chunks, the last of which begins far behind the first window."""


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tiny("gemma3", tmp_path_factory.mktemp("windows") / "gemma3")


@pytest.fixture
def stock(forked_servers: Any, gemma3: Any) -> Any:
    return forked_servers.get(model=gemma3, common=COMMON)


@pytest.fixture
def ours(forked_servers: Any, gemma3: Any) -> Any:
    server = forked_servers.get(*TENTH, model=gemma3, common=COMMON)
    server.flush()
    return server


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (224, 224, 3)).astype(np.uint8))


def options(tokens: int = 40, **params: Any) -> dict[str, Any]:
    return {"max_tokens": tokens, "ignore_eos": True, "logprobs": True, "custom_params": params}


def test_budget_one_is_stock(stock: Any, ours: Any, an_ask: Any) -> None:
    """Prompts on both sides of the window's edge, answers that cross it, prefix hits, several at once."""
    asked = [("red K?", ()), (TEXT, ()), (TEXT, (picture(1),)), ("blue A? " + TEXT, (picture(1),)), (TEXT[:80], ())]
    stock.flush()
    for at_once in (1, 5):
        asks = [an_ask(text, images, options()) for text, images in asked]
        theirs = stock.ask_all(asks, at_once)
        mine = ours.ask_all([an_ask(text, images, options(kv_budget=1.0)) for text, images in asked], at_once)
        for number, (a, b) in enumerate(zip(theirs, mine, strict=True)):
            assert b.prompt_tokens == a.prompt_tokens
            assert b.choices[0].tokens == a.choices[0].tokens, f"request {number}, {at_once} at once"
            assert np.allclose(b.choices[0].logprobs, a.choices[0].logprobs, atol=1e-3)
        if at_once == 1:
            assert [a.cached_tokens for a in mine] == [a.cached_tokens for a in theirs]
            assert max(a.cached_tokens for a in mine) >= IMAGE_TOKENS


def test_books_of_both_kinds_of_layers(ours: Any) -> None:
    """The budget is that of the counted layers; where a prompt may be found again, windows keep all of it."""
    answer = ours.ask(TEXT, picture(2), return_meta_info=True, **options(4, kv_share="policy", kv_report="positions"))
    state, report = ours.settled(), answer.report
    (run,) = report["vision"]
    assert run["end"] - run["begin"] == IMAGE_TOKENS
    front, length = run["begin"], answer.prompt_tokens
    kept = [len(layer) for layer in report["kept_positions"]]
    assert len(kept) == COUNTED
    assert sum(kept) == COUNTED * front + round(0.1 * COUNTED * (length - front))
    held = state["cells_used"] - sum(kept) - SLIDING * length
    assert 0 <= held <= 4 * (COUNTED + SLIDING)  # the answer
    assert state["cells_per_token"] == COUNTED + SLIDING
    assert state["integrity"] == []
    assert state["policy_failures"] == 0


def test_what_has_left_the_window_is_given_back(ours: Any) -> None:
    """While an answer is decoded, its request holds the last tokens in layers with a window."""
    done: list[Any] = []
    reader = threading.Thread(target=lambda: done.append(ours.ask(TEXT, picture(3), **options(300))))
    before = ours.kv_state()["requests_compressed"]
    reader.start()
    held = []
    while reader.is_alive():
        state = ours.kv_state()
        if state["requests_compressed"] > before and state["cells_requests"]:
            held.append(state["cells_requests"])
        time.sleep(0.05)
    reader.join()
    (answer,) = done
    length = answer.prompt_tokens
    kept = round(0.1 * COUNTED * length)
    assert held
    assert min(held) <= kept + SLIDING * WINDOW + (COUNTED + SLIDING) * 60 + COUNTED * 40
    assert max(held) <= kept + SLIDING * WINDOW + (COUNTED + SLIDING) * 301 + COUNTED * 40
    assert max(held) < (COUNTED + SLIDING) * (length + 300)


def assert_shared_without_loss(server: Any) -> None:
    questions = [f"What is the code of {colour} {letter}? " + TEXT for colour, letter in ("aK", "bL", "cM", "dN")]
    shared = [server.ask(text, picture(4), **options(12)) for text in questions]
    alone = [server.ask(text, picture(4), **options(12, kv_share="off")) for text in questions]
    assert [a.choices[0].tokens for a in shared] == [a.choices[0].tokens for a in alone]
    assert all(a.cached_tokens >= IMAGE_TOKENS for a in shared[1:])
    assert server.settled()["staged_tokens"] > 0
    server.flush()
    state = server.settled()
    assert state["cells_used"] == state["host_tokens_used"] == 0
    assert state["integrity"] == []
    assert state["policy_failures"] == 0
    server.assert_alive()


def test_shared_without_loss(ours: Any) -> None:
    """Questions about one image, found in host memory, are answered as if alone."""
    assert_shared_without_loss(ours)


# -- two head sizes, layers without keys ------------------------------------------------------------------------------
# Stock SGLang does not serve Gemma 4 with plain torch: the reference is transformers.


@pytest.fixture(scope="session")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("gemma4", tmp_path_factory.mktemp("windows") / "gemma4")


@pytest.fixture
def two_sizes(forked_servers: Any, gemma4: Path) -> Any:
    server = forked_servers.get(*TENTH, model=gemma4, common=COMMON)
    server.flush()
    return server


def answer_of_transformers(folder: Path, text: str, images: list[Image.Image], tokens: int) -> tuple[Any, ...]:
    """Prompt tokens, greedy answer tokens and their log-probabilities; images are attended to causally."""
    from transformers import AutoProcessor, Gemma4ForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    model = Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[images] if images else None, return_tensors="pt")
    greedy = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    out = model.generate(**inputs, **greedy, output_logits=True, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    answer = out.sequences[0, length:]
    logprobs = [float(step[0].log_softmax(-1)[token]) for step, token in zip(out.logits, answer, strict=True)]
    return length, processor.tokenizer.convert_ids_to_tokens(answer.tolist()), logprobs


def filling_picture(seed: int) -> Image.Image:
    """An image of 14 x 20 patches, as many as fit: SGLang adds padding patches to the first token."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (224, 320, 3)).astype(np.uint8))


@pytest.mark.parametrize("shown", [0, 1], ids=["text", "image"])
@pytest.mark.parametrize("text", ["red K?", TEXT], ids=["inside", "beyond"])
def test_budget_one_is_transformers(two_sizes: Any, gemma4: Path, text: str, shown: int) -> None:
    images = [filling_picture(5)] * shown
    length, _, expected = answer_of_transformers(gemma4, text, images, 12)
    answer = two_sizes.ask(text, *images, **options(12, kv_budget=1.0))
    assert answer.prompt_tokens == length
    assert np.allclose(answer.choices[0].logprobs, expected, atol=2e-3)


def test_books_with_two_head_sizes(two_sizes: Any) -> None:
    """Two layers are counted; three with a window hold two cells per token each; one has no keys."""
    answer = two_sizes.ask(TEXT, picture(6), return_meta_info=True, **options(4, kv_share="policy"))
    state, report = two_sizes.settled(), answer.report
    assert state["cells_per_token"] == 2 + 3 * 2
    kept, length = sum(report["kept_tokens_per_layer"]), answer.prompt_tokens
    assert len(report["kept_tokens_per_layer"]) == 2
    held = state["cells_used"] - kept - 3 * 2 * length
    assert 0 <= held <= 4 * 8  # the answer
    assert state["integrity"] == []
    assert state["policy_failures"] == 0


def test_two_head_sizes_shared_without_loss(two_sizes: Any) -> None:
    assert_shared_without_loss(two_sizes)
