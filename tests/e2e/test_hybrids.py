"""Hybrids: layers of attention, which the arena holds, among layers whose state SGLang keeps.

A tiny Qwen3.5 with random weights: layers 0 and 2 are Gated Delta Networks, 1 and 3 attention.  Questions are longer
than the 64 tokens between which SGLang keeps states, so that it shares an image only where a state is kept behind it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.models.make_tiny import make_tiny
from vlcache_sgl.client.client import user_says

COMMON = (
    *("--dtype", "float32", "--chunked-prefill-size", "512", "--max-total-tokens", "16384"),
    *("--max-running-requests", "8", "--enable-cache-report", "--skip-server-warmup", "--sleep-on-idle"),
)
TENTH = ("--kv-policy", "vlcache", "--kv-budget", "0.1", "--kv-host-memory", "32MB")
EXTRA_BUFFER: tuple[str, ...] = ()
"""SGLang's default with overlap scheduling: a state in the middle of each chunk, on a grid."""
NO_BUFFER = ("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule")
"""States at the ends of chunks."""
GRID = 64
ATTENTION = [1, 3]
"""The model's layers with a KV cache."""
TOKENS = 24
DETAIL = " Say all that is on the left, then all that is on the right, and what is between."
SIZES = ((640, 640), (320, 960), (960, 960), (512, 384))
"""Of images: 400, 300, 900 and 192 tokens, the third in two chunks."""


def question(name: str) -> str:
    return f"What is the code of {name}?{DETAIL}"


def draw(number: int, seed: int = 0) -> Image.Image:
    """Noise over a gradient: no two patches alike."""
    width, height = SIZES[number % len(SIZES)]
    random = np.random.default_rng(1000 * seed + number)
    slope = np.linspace(0, 155, width)[None, :, None] + np.zeros((height, 1, 3))
    return Image.fromarray((slope + random.integers(0, 100, (height, width, 3))).astype(np.uint8))


def vision_tokens(number: int) -> int:
    width, height = SIZES[number % len(SIZES)]
    return (width // 32) * (height // 32)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_5", tmp_path_factory.mktemp("hybrid") / "qwen3_5")


@pytest.fixture(
    params=[
        pytest.param(EXTRA_BUFFER, id="extra_buffer"),
        pytest.param(NO_BUFFER, id="no_buffer", marks=pytest.mark.slow),
    ],
    scope="module",
)
def strategy(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """How SGLang keeps states; of module scope: all tests of one strategy follow each other, on the same server."""
    flags: tuple[str, ...] = request.param
    return flags


@pytest.fixture
def hybrid(servers: Any, model: Path, strategy: tuple[str, ...]) -> Any:
    server = servers.get(*TENTH, *strategy, model=model, common=COMMON)
    server.flush()
    return server


def options(**params: Any) -> dict[str, Any]:
    return {
        "max_tokens": TOKENS,
        "logprobs": True,
        "ignore_eos": True,
        "return_meta_info": True,
        "custom_params": params,
    }


def assert_same(ours: Any, theirs: Any) -> None:
    (a,), (b,) = ours.choices, theirs.choices
    assert a.tokens == b.tokens
    assert np.allclose(a.logprobs, b.logprobs, atol=1e-4)


def assert_nothing_held(server: Any) -> None:
    server.flush()
    state = server.settled()
    assert state["cells_used"] == state["host_tokens_used"] == 0
    assert state["virtual_slots_free"] == state["virtual_slots_total"]
    assert state["integrity"] == []
    server.assert_alive()


def test_a_second_question_finds_the_image_and_is_answered_as_if_alone(hybrid: Any, strategy: tuple[str, ...]) -> None:
    for number in range(len(SIZES)):
        image, end = draw(number), None
        for name in ("red K", "blue A", "green B"):
            shared = hybrid.ask(question(name), image, **options(kv_report="positions"))
            alone = hybrid.ask(question(name), image, **options(kv_share="off"))
            assert_same(shared, alone)
            assert shared.report["kept_tokens_per_layer"] == alone.report["kept_tokens_per_layer"]
            if end is None:
                end = shared.report["vision"][-1]["end"]
                assert end - shared.report["vision"][-1]["begin"] == vision_tokens(number)
                assert shared.cached_tokens < GRID
            else:
                assert end - (GRID if strategy == EXTRA_BUFFER else 1) < shared.cached_tokens <= end
                assert shared.report["shared_tokens"] == shared.cached_tokens
    assert hybrid.settled()["prefix_hits"] >= 2 * len(SIZES)
    assert_nothing_held(hybrid)


def test_books_and_reports_count_the_layers_of_attention(hybrid: Any) -> None:
    state = hybrid.settled()
    assert state["layers"] == ATTENTION
    assert state["cells_per_token"] == 2
    assert state["bytes_per_cell"] == 2 * 2 * 32 * 4  # K and V of 2 heads of 32 float32
    for number in range(len(SIZES)):
        before = hybrid.settled()
        answer = hybrid.ask(
            question("red K"), draw(number, seed=1), **options(kv_share="policy", kv_report="positions")
        )
        after, report = hybrid.settled(), answer.report
        (run,) = report["vision"]
        front, length = run["begin"], answer.prompt_tokens
        expected = 2 * front + round(0.1 * 2 * (length - front))
        kept = [len(positions) for positions in report["kept_positions"]]
        assert len(kept) == 2
        assert sum(kept) == sum(report["kept_tokens_per_layer"]) == expected
        assert after["cells_kept"] - before["cells_kept"] == expected
        assert after["vision_seen_by_layer"][0] - (before["vision_seen_by_layer"] or [0])[0] == vision_tokens(number)
        print(
            f"{length} prompt tokens, {answer.cached_tokens} cached, kept by layer "
            f"{dict(zip(ATTENTION, report['kept_tokens_per_layer'], strict=True))}"
        )
    assert after["policy_failures"] == 0
    assert after["requests_compressed"] >= len(SIZES)
    assert_nothing_held(hybrid)


def test_eight_at_a_time_are_answered_like_one_at_a_time(hybrid: Any, an_ask: Any) -> None:
    """Prompts of two chunks beside those of one, and decode steps between the chunks."""
    asks = [an_ask(question(f"red {seed}"), (draw(seed, seed=2),), options()) for seed in range(12)]
    together = hybrid.ask_all(asks, at_once=8)
    hybrid.flush()
    for one, many in zip(hybrid.ask_all(asks), together, strict=True):
        assert_same(many, one)
        assert many.report["kept_tokens_per_layer"] == one.report["kept_tokens_per_layer"]
    assert_nothing_held(hybrid)


def test_two_images_and_a_further_turn(hybrid: Any) -> None:
    """The state is kept behind the last image; a turn more goes on from there."""
    images = (draw(0, seed=3), draw(3, seed=3))
    first = hybrid.ask(question("red K"), *images, **options())
    turns = [
        {"role": "user", "content": _parts(question("red K"), *images)},
        {"role": "assistant", "content": "It is 7."},
        {"role": "user", "content": question("blue A")},
    ]
    second = hybrid.ask(turns, **options())
    assert second.cached_tokens > vision_tokens(0) + vision_tokens(3) - GRID
    assert_same(second, hybrid.ask(turns, **options(kv_share="off")))
    assert first.report["kept_tokens_per_layer"] != second.report["kept_tokens_per_layer"]
    assert_nothing_held(hybrid)


def _parts(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = user_says(text, *images)["content"]
    return content


def test_states_of_aborted_requests_go_back(hybrid: Any) -> None:
    """SGLang counts its states whenever it is idle."""
    body = {
        "model": "default",
        "stream": True,
        "max_tokens": 4000,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": _parts(question("red K"), draw(2, seed=4))}],
    }
    for _ in range(2):
        with httpx.stream("POST", f"{hybrid.url}/v1/chat/completions", json=body, timeout=60) as reply:
            next(reply.iter_raw())
    assert_nothing_held(hybrid)


# -- beside stock SGLang ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_budget_one_is_stock(servers: Any, model: Path, strategy: tuple[str, ...], hybrid: Any, an_ask: Any) -> None:
    """Chunked prefills, prefix hits, several images, texts and batches of eight: stock's tokens and stock's hits."""
    stock = servers.get(*strategy, model=model, common=COMMON)
    full = options(kv_budget=1.0)
    plain = {name: value for name, value in full.items() if name != "custom_params"}
    prompts: list[tuple[str, tuple[Image.Image, ...]]] = [
        (question(name), (draw(number, seed=5),)) for number in range(len(SIZES)) for name in ("red K", "blue A")
    ]
    prompts += [("blue A?", (draw(0, seed=5),)), (question("red K"), (draw(0, seed=5), draw(1, seed=5)))]
    prompts += [("a text " * 90, ()), ("a text " * 90 + "and more", ())]
    for turns, images in prompts:
        theirs, ours = stock.ask(turns, *images, **plain), hybrid.ask(turns, *images, **full)
        assert (ours.prompt_tokens, ours.cached_tokens) == (theirs.prompt_tokens, theirs.cached_tokens)
        assert_same(ours, theirs)
    fresh = [(question(f"red {seed}"), (draw(seed, seed=6),)) for seed in range(8)]
    pairs = zip(
        hybrid.ask_all([an_ask(*prompt, full) for prompt in fresh], at_once=8),
        stock.ask_all([an_ask(*prompt, plain) for prompt in fresh], at_once=8),
        strict=True,
    )
    for ours, theirs in pairs:
        assert_same(ours, theirs)
    assert_nothing_held(hybrid)


@pytest.mark.slow
def test_few_states_cost_hits_and_no_answer(servers: Any, model: Path, hybrid: Any, strategy: tuple[str, ...]) -> None:
    """A pool of states that serves one request at a time, and cached prefixes as long as nobody needs their states."""
    few = servers.get(
        *TENTH, *strategy, *("--max-mamba-cache-size", "5", "--kv-min-tokens", "16"), model=model, common=COMMON
    )
    images = [draw(number, seed=7) for number in range(len(SIZES))]
    for name in ("red K", "blue A"):
        for image in images:
            assert_same(few.ask(question(name), image, **options()), hybrid.ask(question(name), image, **options()))
    assert_nothing_held(few)


@pytest.mark.slow
def test_two_ranks_answer_like_one(
    servers: Any, model: Path, hybrid: Any, strategy: tuple[str, ...], an_ask: Any
) -> None:
    two = servers.get(
        *TENTH, *strategy, "--tp", "2", model=model, common=COMMON, env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    )
    asks = [
        an_ask(question(name), (draw(number, seed=8),), options())
        for number in range(3)
        for name in ("red K", "blue A")
    ]
    for one, both in zip(hybrid.ask_all(asks), two.ask_all(asks), strict=True):
        assert both.choices[0].tokens == one.choices[0].tokens
        assert both.report["kept_tokens_per_layer"] == one.report["kept_tokens_per_layer"]
        assert both.cached_tokens == one.cached_tokens
    state = two.settled()
    assert state["layers"] == ATTENTION
    assert state["bytes_per_cell"] == 2 * 32 * 4
    assert_nothing_held(two)


@pytest.mark.slow
def test_experts_beside_the_layers_change_nothing(servers: Any, tmp_path: Path, strategy: tuple[str, ...]) -> None:
    """`Qwen3_5MoeForConditionalGeneration`: stock's tokens at budget 1.0, hits and books at 0.1."""
    experts = make_tiny("qwen3_5_moe", tmp_path / "qwen3_5_moe")
    stock = servers.get(*strategy, model=experts, common=COMMON)
    ours = servers.get(*TENTH, *strategy, model=experts, common=COMMON)
    plain = {name: value for name, value in options().items() if name != "custom_params"}
    for name in ("red K", "blue A"):
        image = draw(2, seed=9)
        full = ours.ask(question(name), image, **options(kv_budget=1.0))
        assert_same(full, stock.ask(question(name), image, **plain))
        tenth = ours.ask(question(name), image, **options())
        assert_same(tenth, ours.ask(question(name), image, **options(kv_share="off")))
        assert len(tenth.report["kept_tokens_per_layer"]) == 2
    assert tenth.cached_tokens > vision_tokens(2) - GRID
    assert_nothing_held(ours)


@pytest.mark.slow
def test_what_is_recalled_is_the_full_cache(servers: Any, model: Path, strategy: tuple[str, ...]) -> None:
    """An area for every evicted token of the layers with attention: the tokens of the full cache."""
    server = servers.get(*TENTH, *strategy, "--kv-recall", "24", model=model, common=COMMON)
    for number in range(2):
        image = draw(number, seed=10)
        for name in ("red K", "blue A"):
            full = server.ask(question(name), image, **options(kv_budget=1.0))
            back = server.ask(question(name), image, **options(kv_recall=4096))
            assert back.choices[0].tokens == full.choices[0].tokens
            assert back.report["ratio"] < 0.2
            some = server.ask(question(name), image, **options())
            assert some.report["recall"]["tokens"] == 24
    assert_nothing_held(server)


@pytest.mark.slow
def test_a_policy_that_reads_twice(servers: Any, model: Path, strategy: tuple[str, ...]) -> None:
    """The second reading of a prompt leaves no trace in the states that its answer goes on from."""
    server = servers.get(
        *("--kv-policy", "kvzip", "--kv-budget", "1.0", "--kv-host-memory", "32MB"),
        *strategy,
        model=model,
        common=COMMON,
    )
    for number in (0, 2):
        image = draw(number, seed=11)
        server.flush()
        plain = server.ask(question("red K"), image, **options(kv_policy="vlcache", kv_budget=1.0))
        server.flush()
        nearly = server.ask(question("red K"), image, **options(kv_budget=0.999))
        assert 0.99 < nearly.report["ratio"] < 1
        assert np.isclose(nearly.choices[0].logprobs[0], plain.choices[0].logprobs[0], atol=5e-3)
        server.flush()
        read = server.ask(question("red K"), image, **options(kv_budget=0.3))
        assert read.report["policy"] == "kvzip"
        assert 0.2 < read.report["ratio"] < 0.4
        assert not np.isclose(read.choices[0].logprobs[0], plain.choices[0].logprobs[0], atol=0.01)
        assert_same(server.ask(question("red K"), image, **options(kv_budget=0.3)), read)
    assert server.settled()["policy_failures"] == 0
    assert_nothing_held(server)


@pytest.mark.slow
def test_cells_of_8_bits(servers: Any, model: Path, strategy: tuple[str, ...], an_ask: Any) -> None:
    """Stock's tokens at budget 1.0 with the same type, and nobody's answer depends on who asked before."""
    narrow = (*strategy, "--kv-cache-dtype", "fp8_e4m3")
    stock, ours = (servers.get(*flags, *narrow, model=model, common=COMMON) for flags in ((), TENTH))
    plain = {name: value for name, value in options().items() if name != "custom_params"}
    for number in range(2):
        for name in ("red K", "blue A"):
            image = draw(number, seed=12)
            theirs = stock.ask(question(name), image, **plain)
            mine = ours.ask(question(name), image, **options(kv_budget=1.0))
            assert mine.choices[0].tokens == theirs.choices[0].tokens
            assert np.allclose(mine.choices[0].logprobs, theirs.choices[0].logprobs, atol=2e-2)
            assert_same(
                ours.ask(question(name), image, **options()),
                ours.ask(question(name), image, **options(kv_share="off")),
            )
    assert ours.settled()["bytes_per_cell"] == 2 * 2 * 32
    assert_nothing_held(ours)
