"""Architectures of `models/matrix.toml` that load with tiny random weights: what their rows claim, on two servers each.

Stock tokens at budget 1.0, vision tokens found and books balanced at 0.1, a second question that shares.  Servers are
forked from one process that has imported SGLang.
"""

from __future__ import annotations

import base64
import io
import json
import wave
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from films import film_of, message, need_ffmpeg
from PIL import Image

from benchmarks.models.make_tiny import make_tiny
from models.matrix import read_rows
from models.tiny import glm, internvl, llava, minicpm, ocr, pixtral, qwen, smolvlm
from models.tiny.checkpoint import LAYERS
from vlcache_sgl.client.client import data_url
from vlcache_sgl.client.server import ServerError

FILE = "tests/e2e/test_matrix.py"
COMMON = (
    *("--load-format", "dummy", "--dtype", "float32", "--chunked-prefill-size", "512", "--max-total-tokens", "16384"),
    *("--max-running-requests", "8", "--enable-cache-report", "--skip-server-warmup", "--sleep-on-idle"),
)
TENTH = ("--kv-policy", "vlcache", "--kv-budget", "0.1")
TOKENS = 24
QUESTIONS = ("What is the code of red K?", "blue A?")


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint, two images, and the vision tokens that its family makes of them, worked out by hand."""

    build: Callable[[Path], None]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    """Width and height of the images."""
    runs: tuple[tuple[int, ...], tuple[int, ...]]
    """Of each image: tokens of each run of them that nothing interrupts."""
    grids: tuple[tuple[int, int], tuple[int, int]] | None = None
    """Rows and columns of each image, where `vlcache inspect` can draw it."""
    flags: tuple[str, ...] = ()
    mended: bool = False
    """Served with `plugins/mended_sglang`, because SGLang itself falls short of serving it."""
    rounded: bool = False
    """SGLang computes in bfloat16 whatever it is told: tokens may part where two are equally likely."""


def on_grid(
    build: Callable[[Path], None], sizes: tuple[tuple[int, int], tuple[int, int]], side: int, drawn: bool = True
) -> Case:
    """A family that makes a token of each square of `side` pixels, in one run."""
    grids = tuple((height // side, width // side) for width, height in sizes)
    runs = tuple((rows * columns,) for rows, columns in grids)
    return Case(build, sizes, runs, grids if drawn else None)  # type: ignore[arg-type]


MODELS: dict[str, Case] = {
    "qwen3_vl_moe": on_grid(qwen.qwen3_vl_moe, ((640, 640), (320, 768)), 32),
    "qwen3_omni": on_grid(qwen.qwen3_omni, ((640, 640), (320, 768)), 32),
    "glm4v": on_grid(glm.glm4v, ((560, 560), (336, 756)), 28),
    "glm4v_moe": on_grid(glm.glm4v_moe, ((560, 560), (336, 756)), 28),
    "glm_ocr": on_grid(glm.glm_ocr, ((560, 560), (336, 756)), 28),
    "paddleocr_vl": on_grid(ocr.paddleocr_vl, ((560, 560), (336, 756)), 28),
    "dots_ocr": replace(
        on_grid(ocr.dots_ocr, ((560, 560), (336, 756)), 28), flags=("--dtype", "bfloat16"), rounded=True
    ),
    # Each row of patches ends with a token that is none.
    "mistral3": Case(pixtral.mistral3, ((560, 560), (336, 448)), ((20,) * 20, (12,) * 16), mended=True),
    "ministral3": Case(pixtral.ministral3, ((560, 560), (336, 448)), ((20,) * 20, (12,) * 16), mended=True),
    "pixtral": Case(pixtral.pixtral, ((280, 280), (140, 420)), ((20,) * 20, (10,) * 30), mended=True),
    "lightonocr": on_grid(pixtral.lightonocr, ((560, 560), (336, 448)), 28, drawn=False),
    # Tiles of 16 tokens, and one look at everything.
    "internvl_hf": Case(internvl.internvl_hf, ((560, 560), (336, 672)), ((160,), (144,))),
    # Tiles of 64: as many as twelve allow, 3 x 3 and 2 x 4.
    "internvl_chat": Case(
        internvl.internvl_chat, ((896, 896), (448, 896)), ((640,), (576,)), flags=("--trust-remote-code",)
    ),
    # One view of 64 tokens, then the tiles, each row of them ended by a token of its own.
    "llava_onevision": Case(llava.llava_onevision, ((336, 336), (112, 224)), ((664,), (208,))),
    # Tiles of 16 tokens, 4 x 4 and 2 x 4, and one look at everything, each with a name.
    "smolvlm": Case(smolvlm.smolvlm, ((448, 448), (448, 224)), ((16,) * 17, (16,) * 9)),
    # A view of 64 tokens, and two of its halves, as it is wider than high.
    "minicpmv4_5": Case(
        minicpm.minicpmv4_5,
        ((672, 448), (896, 448)),
        ((64,) * 3, (64,) * 3),
        flags=("--trust-remote-code",),
        mended=True,
    ),
}
MENDED = Path(__file__).parent / "plugins/mended_sglang"
DEFAULT_RUN = ("glm4v", "qwen3_vl_moe")
"""What `make test` serves as well: M-RoPE, experts with deep stacking."""
UNCACHED = ("internvl_hf", "llava_onevision", "smolvlm")
"""Served over the model of transformers: SGLang turns its prefix cache off."""


def draw(size: tuple[int, int], seed: int) -> Image.Image:
    """Noise over a gradient: no two patches alike."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 155, size[0])[None, :, None] + np.zeros((size[1], 1, 3))
    return Image.fromarray((slope + rng.integers(0, 100, (size[1], size[0], 3))).astype(np.uint8))


def test_every_case_has_its_row() -> None:
    """And every row that names this file its case."""
    assert {case for row in read_rows() for file, case in row.cases if file == FILE} == set(MODELS)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in DEFAULT_RUN else pytest.mark.slow) for name in MODELS],
)
def name(request: pytest.FixtureRequest) -> str:
    """Of module scope: all tests of one model follow each other, on the same two servers."""
    return str(request.param)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(name)`: the folder of a model."""
    folder = tmp_path_factory.mktemp("matrix")

    def written(name: str) -> Path:
        if not (folder / name).exists():
            MODELS[name].build(folder / name)
        return folder / name

    return written


@pytest.fixture
def served(forked_servers: Any, checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    """`served(name, *flags)`: a server of a model."""

    def running(name: str, *flags: str) -> Any:
        case = MODELS[name]
        env = {"PYTHONPATH": str(MENDED)} if case.mended else None
        return forked_servers.get(*case.flags, *flags, model=checkpoint(name), common=COMMON, env=env)

    return running


def outputs(server: Any, image: Image.Image, question: str = QUESTIONS[0], **more: Any) -> Any:
    return server.ask(question, image, max_tokens=TOKENS, logprobs=True, ignore_eos=True, **more)


def test_budget_one_is_stock(served: Any, name: str) -> None:
    """The same tokens, for an image that is new and for a question on a cached prefix."""
    stock = served(name)
    ours = served(name, *TENTH)
    answers = set()
    for seed, size in enumerate(MODELS[name].sizes):
        for question in QUESTIONS:
            theirs = outputs(stock, draw(size, seed), question)
            mine = outputs(ours, draw(size, seed), question, custom_params={"kv_budget": 1.0})
            (a,), (b,) = theirs.choices, mine.choices
            assert (mine.prompt_tokens, mine.cached_tokens) == (theirs.prompt_tokens, theirs.cached_tokens)
            pairs = enumerate(zip(a.tokens, b.tokens, strict=True))
            parted = next((number for number, (x, y) in pairs if x != y), None)
            assert parted is None or MODELS[name].rounded
            tolerance = 0.05 if MODELS[name].rounded else 1e-4
            alike = TOKENS if parted is None else max(1, parted)
            assert np.allclose(a.logprobs[:alike], b.logprobs[:alike], atol=tolerance)
            answers.add(a.logprobs[0])
    assert len(answers) == 2 * len(QUESTIONS), "the model does not look at its prompt"


COPY_WITH_POSITIONS = {"kv_share": "policy", "kv_report": "positions"}
"""What a policy keeps stays in the arena for others, and is listed."""


def test_vision_is_found(served: Any, name: str) -> None:
    """At its place in the prompt, and the budget is kept."""
    server, case = served(name, *TENTH), MODELS[name]
    for number, size in enumerate(case.sizes):
        server.flush()
        before = server.settled()
        answer = outputs(server, draw(size, 100 + number), custom_params=COPY_WITH_POSITIONS, return_meta_info=True)
        after, report = server.settled(), answer.report
        runs = report["vision"]
        assert tuple(run["end"] - run["begin"] for run in runs) == case.runs[number]
        assert {run["modality"] for run in runs} == {"image"}
        if case.grids is not None:
            ((grid,),) = [run["grids"] for run in runs]
            assert (grid["rows"], grid["columns"]) == case.grids[number]
        kept = sum(len(layer) for layer in report["kept_positions"])
        assert len(report["kept_positions"]) == LAYERS
        front = runs[0]["begin"]  # stays whole, beside the budget of the rest
        expected = LAYERS * front + round(0.1 * LAYERS * (answer.prompt_tokens - front))
        assert kept == after["cells_kept"] - before["cells_kept"] == expected
        assert after["requests_compressed"] == before["requests_compressed"] + 1
        assert after["policy_failures"] == 0
        # And the answer, whole.
        least, most = (0, 0) if name in UNCACHED else (kept, kept + LAYERS * TOKENS)
        assert least <= after["cells_used"] <= most
        assert after["integrity"] == []
        seen = after["vision_seen_by_layer"][0] - (before["vision_seen_by_layer"] or [0])[0]
        assert seen == sum(case.runs[number])


def test_a_second_question_shares(served: Any, name: str) -> None:
    server, case = served(name, *TENTH), MODELS[name]
    server.flush()
    image, tokens = draw(case.sizes[0], 7), sum(case.runs[0])
    first, second = outputs(server, image), outputs(server, image, QUESTIONS[1])
    if name in UNCACHED:
        stock = served(name)
        theirs = [outputs(stock, image, question).cached_tokens for question in QUESTIONS[:2]]
        assert [first.cached_tokens, second.cached_tokens] == theirs == [0, 0]
    else:
        assert first.cached_tokens < tokens <= second.cached_tokens
    assert outputs(server, draw(case.sizes[0], 8)).cached_tokens < tokens
    server.flush()
    assert server.settled()["cells_used"] == 0
    server.assert_alive()


FILMS = {"qwen3_vl_moe": 32, "qwen3_omni": 32, "glm4v": 28, "glm4v_moe": 28}
"""Models that were tried with videos, with the width of a token in pixels; a token spans two frames."""
ROWS, COLUMNS = 10, 12


@pytest.mark.slow
@pytest.mark.parametrize("model", FILMS)
def test_a_video(served: Any, model: str) -> None:
    """Stock's tokens at budget 1.0; found as vision; shared by a second question."""
    sizes = (COLUMNS * FILMS[model], ROWS * FILMS[model])
    film, other = (film_of([draw(sizes, seed + number) for number in range(8)]) for seed in (20, 40))
    need_ffmpeg(film)
    stock, ours = served(model), served(model, *TENTH)
    said = {"max_tokens": TOKENS, "logprobs": True, "ignore_eos": True}
    for question in QUESTIONS:
        theirs = stock.ask(message(film, question), **said)
        mine = ours.ask(message(film, question), **said, custom_params={"kv_budget": 1.0})
        assert (mine.prompt_tokens, mine.cached_tokens) == (theirs.prompt_tokens, theirs.cached_tokens)
        assert mine.choices[0].tokens == theirs.choices[0].tokens
        assert np.allclose(mine.choices[0].logprobs, theirs.choices[0].logprobs, atol=1e-4)
    ours.flush()
    told = {"return_meta_info": True, "custom_params": {"kv_report": "positions"}}
    runs = ours.ask(message(film, QUESTIONS[0]), **said, **told).report["vision"]
    assert {run["modality"] for run in runs} == {"video"}
    tokens = sum(run["end"] - run["begin"] for run in runs)
    grids = [grid for run in runs for grid in run["grids"]]
    assert sum(grid["rows"] * grid["columns"] for grid in grids) == tokens
    assert tokens >= len(grids) * ROWS * COLUMNS > 0  # Qwen3-Omni draws them larger
    assert ours.ask(message(film, QUESTIONS[1]), **said).cached_tokens >= tokens
    assert ours.ask(message(other, QUESTIONS[0]), **said).cached_tokens < ROWS * COLUMNS
    ours.flush()
    assert ours.settled()["cells_used"] == 0
    assert ours.settled()["policy_failures"] == 0


def sound(seconds: float) -> str:
    """A URL of a tone with noise."""
    rate = 16000
    time = np.arange(int(rate * seconds))
    wave_form = np.sin(0.05 * time) * 8000 + np.random.default_rng(1).integers(-2000, 2000, time.size)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(wave_form.astype("<i2").tobytes())
    return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.mark.slow
def test_audio_is_not_vision(served: Any) -> None:
    server, case = served("qwen3_omni", *TENTH), MODELS["qwen3_omni"]
    audio = {"type": "audio_url", "audio_url": {"url": sound(6.0)}}
    image = {"type": "image_url", "image_url": {"url": data_url(draw(case.sizes[0], 9))}}
    question = {"type": "text", "text": QUESTIONS[0]}

    def ask(*content: dict[str, Any]) -> Any:
        told = {"custom_params": {"kv_report": "positions"}, "return_meta_info": True}
        return server.ask({"role": "user", "content": list(content)}, max_tokens=4, **told)

    silent, alone = ask(question), ask(audio, question)
    assert alone.prompt_tokens > silent.prompt_tokens + 50
    assert alone.report == {"skipped": "scope"}
    (run,) = ask(audio, image, question).report["vision"]
    assert (run["modality"], run["end"] - run["begin"]) == ("image", case.runs[0][0])
    assert run["begin"] > 50  # the sound comes first, and stays whole
    server.assert_alive()


def test_a_layer_that_only_the_loaded_model_tells_of(forked_servers: Any, tmp_path: Path) -> None:
    """A checkpoint whose attention is not causal: its layer is named, in one line, and the exit code is 2."""
    model = make_tiny("qwen3_5", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["is_causal"] = False
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ServerError) as refusal:
        forked_servers.get(*TENTH, model=model, common=COMMON)
    said = str(refusal.value)
    assert "exited with code 2" in said
    (line,) = [line for line in said.splitlines() if "does not support layer" in line]
    assert line.startswith("sglang serve: error: ")
    assert "layers.1." in line  # the first one with attention
    assert "attention of kind encoder_only" in line
    assert "Traceback" not in said
