"""Other architectures with tiny random weights: stock tokens at budget 1.0, vision found, books balanced at 0.1.

Bundled weights answer questions; these only have to be computed alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from films import film_of, message, need_ffmpeg
from PIL import Image

from benchmarks.models.make_tiny import make_tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "models/tinyvlm/grounded"
COMMON = (
    *("--chunked-prefill-size", "512", "--max-total-tokens", "16384", "--max-running-requests", "8"),
    *("--enable-cache-report", "--skip-server-warmup", "--sleep-on-idle"),
)
TENTH = ("--kv-policy", "vlcache", "--kv-budget", "0.1")
TOKENS = 24
LAYERS = 4


@dataclass(frozen=True)
class Model:
    """An architecture, and what its vision tokens must be."""

    dtype: str
    sizes: tuple[tuple[int, int], ...]
    """Width and height of test images."""
    grids: tuple[tuple[tuple[int, int, bool], ...], ...]
    """Rows, columns and newlines of each picture's grids, worked out by hand."""
    layers: int = LAYERS
    """With a KV cache."""
    hits: int = 1
    """Tokens between two places where a prefix hit can end."""


MODELS = {
    # Tokens of 28 x 28 pixels.
    "qwen2_vl": Model(
        "float32", ((560, 560), (336, 756), (840, 280)), (((20, 20, False),), ((27, 12, False),), ((10, 30, False),))
    ),
    # Of 32 x 32.
    "qwen3_vl": Model(
        "float32", ((640, 640), (320, 768), (960, 256)), (((20, 20, False),), ((24, 10, False),), ((8, 30, False),))
    ),
    # A hybrid: half of its layers have attention, and states are kept every 64 tokens.
    "qwen3_5": Model(
        "float32",
        ((640, 640), (320, 768), (960, 256)),
        (((20, 20, False),), ((24, 10, False),), ((8, 30, False),)),
        layers=2,
        hits=64,
    ),
    # An overview of 6 x 6, then tiles of 6 x 6 as far as the image fills them, each row ended by a newline.
    "llava": Model(
        "float16",
        ((500, 500), (240, 230), (500, 250)),
        (
            ((6, 6, False), (18, 18, True)),  # 3 x 3 tiles
            ((6, 6, False), (18, 18, True)),
            ((6, 6, False), (10, 18, True)),  # 3 x 3 tiles, of which the image fills the middle
        ),
    ),
}


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Noise over a gradient: no two patches alike."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 155, size[0])[None, :, None] + np.zeros((size[1], 1, 3))
    return Image.fromarray((slope + rng.integers(0, 100, (size[1], size[0], 3))).astype(np.uint8))


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    """Of module scope: all tests of one model follow each other, on the same two servers."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`tiny(name)`: the folder of a model."""
    folder = tmp_path_factory.mktemp("tiny")
    return lambda name: BUNDLED if name == BUNDLED.name else make_tiny(name, folder / name)


def served(servers: Any, tiny: Any, name: str, *flags: str) -> Any:
    dtype = MODELS[name].dtype if name in MODELS else "float32"
    return servers.get(*flags, model=tiny(name), common=("--dtype", dtype, *COMMON))


def outputs(server: Any, images: list[Image.Image], question: str = "What is the code of red K?", **more: Any) -> Any:
    """Tokens and log-probabilities of one answer."""
    return server.ask(question, *images, max_tokens=TOKENS, logprobs=True, ignore_eos=True, **more)


def test_budget_one_is_stock(servers: Any, tiny: Any, name: str) -> None:
    """The same tokens, one image at a time and a question again on a cached prefix."""
    model = MODELS[name]
    stock, ours = served(servers, tiny, name), served(servers, tiny, name, *TENTH)
    full = {"custom_params": {"kv_budget": 1.0}}
    for number, size in enumerate(model.sizes):
        images = [picture(size, number)]
        for question in ("What is the code of red K?", "blue A?"):
            theirs, mine = outputs(stock, images, question), outputs(ours, images, question, **full)
            assert mine.prompt_tokens == theirs.prompt_tokens
            assert mine.cached_tokens == theirs.cached_tokens
            (a,), (b,) = theirs.choices, mine.choices
            if model.dtype == "float32":
                assert b.tokens == a.tokens
            same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(a.tokens))
            tolerance = 1e-4 if model.dtype == "float32" else 0.05
            assert np.allclose(a.logprobs[: max(1, same)], b.logprobs[: max(1, same)], atol=tolerance)


COPY_WITH_POSITIONS = {"kv_share": "policy", "kv_report": "positions"}
"""What a policy keeps stays in the arena for others, and is listed."""


def assert_held(cells: int, report: dict[str, Any], hits: int) -> None:
    """What the arena has of a prompt and its answer that have ended."""
    kept, end = report["kept_positions"], report["vision"][-1]["end"]
    if hits == 1:
        kept_in_all = sum(len(layer) for layer in kept)
        assert kept_in_all <= cells <= kept_in_all + len(kept) * TOKENS  # and the answer, whole
    else:  # a prefix ends where a state is: the last one within the image or video
        assert cells == sum(position < end // hits * hits for layer in kept for position in layer)


def test_vision_is_found(servers: Any, tiny: Any, name: str) -> None:
    """Every picture's grids, at their place in the prompt, and the budget is kept."""
    server, model = served(servers, tiny, name, *TENTH), MODELS[name]
    for number, (size, grids) in enumerate(zip(model.sizes, model.grids, strict=True)):
        server.flush()
        before = server.settled()
        answer = outputs(
            server, [picture(size, 100 + number)], custom_params=COPY_WITH_POSITIONS, return_meta_info=True
        )
        after = server.settled()
        report = answer.report
        (run,) = report["vision"]
        assert tuple((g["rows"], g["columns"], g["newlines"]) for g in run["grids"]) == grids
        assert run["end"] - run["begin"] == sum(rows * (columns + newline) for rows, columns, newline in grids)
        assert run["end"] < answer.prompt_tokens
        kept = sum(len(layer) for layer in report["kept_positions"])
        assert len(report["kept_positions"]) == model.layers
        front = run["begin"]  # stays whole, beside the budget of the rest
        expected = model.layers * front + round(0.1 * model.layers * (answer.prompt_tokens - front))
        assert kept == after["cells_kept"] - before["cells_kept"] == expected
        assert after["requests_compressed"] == before["requests_compressed"] + 1
        assert after["policy_failures"] == 0
        assert_held(after["cells_used"], report, model.hits)
        assert after["integrity"] == []
        seen = after["vision_seen_by_layer"][0] - (before["vision_seen_by_layer"] or [0])[0]
        assert seen == run["end"] - run["begin"]


def test_a_follow_up_shares(servers: Any, tiny: Any, name: str) -> None:
    server, image = served(servers, tiny, name, *TENTH), picture(MODELS[name].sizes[0], 7)
    server.flush()
    first, second = outputs(server, [image]), outputs(server, [image], "blue A?")
    tokens = sum(rows * (columns + newline) for rows, columns, newline in MODELS[name].grids[0])
    assert first.cached_tokens < tokens <= second.cached_tokens + MODELS[name].hits - 1
    assert server.settled()["prefix_hits"] >= 1
    server.flush()
    assert server.settled()["cells_used"] == 0
    server.assert_alive()


def test_two_pictures_in_one_prompt(servers: Any, tiny: Any, name: str) -> None:
    """SGLang reads one image of a LLaVA prompt only, unless it is told that there are several."""
    if name == "llava":
        pytest.skip("one picture per prompt")
    server, model = served(servers, tiny, name, *TENTH), MODELS[name]
    server.flush()
    images = [picture(size, 200 + number) for number, size in enumerate(model.sizes[:2])]
    report = outputs(server, images, custom_params={"kv_report": "positions"}, return_meta_info=True).report
    lengths = [run["end"] - run["begin"] for run in report["vision"]]
    assert lengths == [rows * columns for ((rows, columns, _),) in model.grids[:2]]


# -- video ------------------------------------------------------------------------------------------------------------

FRAMES = {BUNDLED.name: 28, "qwen2_vl": 28, "qwen3_vl": 32, "qwen3_5": 32}
"""Models that read videos, with the width of a token in pixels; a token spans two of the frames that are taken."""
ROWS, COLUMNS = 10, 20


@pytest.fixture(scope="module", params=FRAMES)
def film_model(request: pytest.FixtureRequest) -> str:
    """Of module scope, as `name`."""
    need_ffmpeg(film(28, 0))
    return str(request.param)


def film(token: int, seed: int) -> bytes:
    """Two seconds of noise, two tokens deep."""
    return film_of([picture((COLUMNS * token, ROWS * token), 10 * seed + number) for number in range(8)])


def watch(server: Any, video: bytes, question: str = "What is the code of red K?", **more: Any) -> Any:
    return server.ask(message(video, question), max_tokens=TOKENS, logprobs=True, ignore_eos=True, **more)


def test_a_video_at_budget_one_is_stock(servers: Any, tiny: Any, film_model: str) -> None:
    stock, ours = served(servers, tiny, film_model), served(servers, tiny, film_model, *TENTH)
    video = film(FRAMES[film_model], 1)
    for question in ("What is the code of red K?", "blue A?"):
        theirs = watch(stock, video, question)
        mine = watch(ours, video, question, custom_params={"kv_budget": 1.0})
        assert (mine.prompt_tokens, mine.cached_tokens) == (theirs.prompt_tokens, theirs.cached_tokens)
        assert mine.choices[0].tokens == theirs.choices[0].tokens
        assert np.allclose(mine.choices[0].logprobs, theirs.choices[0].logprobs, atol=1e-4)


def test_frames_of_a_video_are_found(servers: Any, tiny: Any, film_model: str) -> None:
    """As vision tokens in their places, compressed and shared like images."""
    server, video = served(servers, tiny, film_model, *TENTH), film(FRAMES[film_model], 2)
    server.flush()
    before = server.settled()
    answer = watch(server, video, custom_params=COPY_WITH_POSITIONS, return_meta_info=True)
    after, runs = server.settled(), answer.report["vision"]
    grid = {"rows": ROWS, "columns": COLUMNS, "newlines": False, "fit": "stretch"}
    assert [grid for run in runs for grid in run["grids"]] == [grid] * 2
    assert {(run["modality"], run["item"]) for run in runs} == {("video", 0)}
    # Qwen3-VL and Qwen3.5 say the time before each.
    assert len(runs) == (2 if film_model in ("qwen3_vl", "qwen3_5") else 1)
    tokens = sum(run["end"] - run["begin"] for run in runs)
    assert tokens == 2 * ROWS * COLUMNS
    layers = len(answer.report["kept_positions"])
    kept = sum(len(layer) for layer in answer.report["kept_positions"])
    front = runs[0]["begin"]  # stays whole, beside the budget of the rest
    expected = layers * front + round(0.1 * layers * (answer.prompt_tokens - front))
    assert kept == after["cells_kept"] - before["cells_kept"] == expected
    assert after["vision_seen_by_layer"][0] - (before["vision_seen_by_layer"] or [0])[0] == tokens
    hits = MODELS[film_model].hits if film_model in MODELS else 1
    assert_held(after["cells_used"], answer.report, hits)
    assert after["integrity"] == []
    server.flush()  # what a policy left for others is not for questions that share without loss
    assert watch(server, video).cached_tokens < ROWS * COLUMNS
    assert watch(server, video, "blue A?").cached_tokens + hits > tokens
    assert watch(server, film(FRAMES[film_model], 3)).cached_tokens < ROWS * COLUMNS
    server.flush()
    assert server.settled()["cells_used"] == 0
    server.assert_alive()
