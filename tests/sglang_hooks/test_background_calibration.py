"""The first start of a model: who measures, who says why not, and how weights reach a scheduler that serves."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlcache_sgl.config import KVConfig, config_from
from vlcache_sgl.policy.choice import Choices
from vlcache_sgl.policy.custom_params import RequestParams
from vlcache_sgl.sglang_hooks import background_calibration as background
from vlcache_sgl.sglang_hooks.background_calibration import OwnServer, objection, wants_weights
from vlcache_sgl.sglang_hooks.session import Session
from vlcache_sgl.sglang_hooks.settings import give_config
from vlcache_sgl.sglang_hooks.weight_knobs import are_knobs, knobs_of, weights_of
from vlcache_sgl.weights import ModelWeights, cache_file, model_key, read_weights

MODEL = str(Path(__file__).parents[2] / "models/tinyvlm/grounded")
LAYERS = ModelWeights((0.5, 0.1))
HEADS = ModelWeights((0.5, 0.1578), ((0.75, 0.25), (0.3156, 0.0)))


def config(**flags: str) -> KVConfig:
    read = config_from({"kv_policy": "vlcache", "kv_budget": "0.2", **flags})
    assert read is not None
    return read


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLCACHE_CACHE", str(tmp_path))
    return cache_file(model_key(Path(MODEL)))


# -- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [LAYERS, HEADS, ModelWeights((1.0,) * 12)], ids=["layers", "heads", "twelve"])
def test_weights_travel_as_numbers(weights: ModelWeights) -> None:
    """Over JSON, in any order."""
    numbers = json.loads(json.dumps(dict(sorted(knobs_of(weights).items(), reverse=True))))
    assert are_knobs(numbers)
    assert weights_of(numbers) == weights
    assert weights_of(numbers).digest == weights.digest


def test_numbers_of_sglang_are_not_ours() -> None:
    assert not are_knobs({"pp_max_micro_batch_size": 8})


@pytest.mark.parametrize(
    "numbers",
    [
        {"kv_weights.1": 0.5},
        {"kv_weights.0": 0.5, "kv_weights.2": 0.5},
        {"kv_weights.0": 0.5, "kv_weights.1": 0.5, "kv_weights.0.0": 0.5},
        {"kv_weights.0.0": 0.5},
        {"kv_weights.0": 0.5, "kv_weights.00": 0.5},
        {"kv_weights.0": 0.5, "kv_weights.0.0.0": 0.5},
        {"kv_weights.0": 0.5, "kv_weights.x": 0.5},
        {"kv_weights.0": 0.5, "kv_weights.-1": 0.5},
        {"kv_weights.0": 0.5, "pp_max_micro_batch_size": 8},
        {"kv_weights.0": 2},
        {"kv_weights.0": 0},
        {"kv_weights.0": float("nan")},
    ],
    ids=str,
)
def test_numbers_that_are_no_weights_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"kv_weights|weights must be"):
        weights_of(numbers)


def test_a_scheduler_uses_them_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(config())
    model = SimpleNamespace(num_layers=2, num_kv_heads=2)
    monkeypatch.setattr(session.choices, "_model", model)
    monkeypatch.setattr(session.choices, "_require", lambda policy: None)

    def change(numbers: dict[str, float]) -> Any:
        request = SimpleNamespace(server_args=numbers)
        return session.weights.set_internal_state(lambda controller, request: "SGLang's", "controller", request)

    def chosen() -> Any:
        return session.choices.select(RequestParams(), 1000)

    assert change({"pp_max_micro_batch_size": 8}) == "SGLang's"
    before = chosen()
    assert change(knobs_of(HEADS)).updated
    after = chosen()
    assert after.weights is not None
    assert after.weights.digest == HEADS.digest
    assert before.weights is None, "who was admitted before keeps what it was admitted with"
    assert after.fingerprint == f"{before.fingerprint}~{HEADS.digest}"
    assert not change({"kv_weights.0": 0.5, "kv_weights.1": 2.0}).updated
    assert not change(knobs_of(ModelWeights((0.5, 0.5, 0.5)))).updated, "weights of another model"
    assert chosen() is after


# -- who measures -----------------------------------------------------------------------------------------------------


def test_a_server_that_has_no_use_for_weights_measures_none(cache: Path) -> None:
    assert wants_weights(config(), MODEL)
    assert not wants_weights(config(kv_policy="kvzip"), MODEL), "its budgets come from the prompt"
    assert not wants_weights(config(kv_policy="scorer=keydiff,allocator=uniform"), MODEL)
    assert not wants_weights(config(kv_budget="1.0"), MODEL)
    assert not wants_weights(config(kv_weights="off"), MODEL)
    HEADS.write(cache)
    assert not wants_weights(config(), MODEL)


def arguments(**given: Any) -> Any:
    return SimpleNamespace(**{"model_path": MODEL, "tokenizer_worker_num": 1, **given})


@pytest.mark.parametrize(
    ("flags", "given", "reason"),
    [
        ({}, {}, None),
        ({"kv_share": "policy"}, {}, None),
        ({"kv_host_memory": "off"}, {}, None),
        ({"kv_allow_policies": "snapkv"}, {}, "'kvzip' is not allowed"),
        ({"kv_budget_max": "0.25"}, {}, "kv_budget 0.3 is out of this server's bounds 0.01 to 0.25"),
        ({}, {"model_path": "nobody/knows-this-model"}, "the files of nobody/knows-this-model are not on this machine"),
        ({}, {"tokenizer_worker_num": 2}, "--tokenizer-worker-num"),
    ],
)
def test_why_a_server_cannot_measure(flags: dict[str, str], given: dict[str, Any], reason: str | None) -> None:
    found = objection(config(**flags), arguments(**given))
    assert found is None if reason is None else reason in (found or "")


def test_the_reason_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    server_args = arguments()
    give_config(server_args, config(kv_allow_policies="none"))
    before = threading.active_count()
    background.start(None, server_args)
    assert threading.active_count() == before
    (line,) = caplog.messages
    assert "'kvzip' is not allowed" in line
    assert "`vlcache calibrate`" in line
    assert "\n" not in line


# -- the measurement, against a server of this test -------------------------------------------------------------------


class Fake(ThreadingHTTPServer):
    """Answers as SGLang does; what it was sent is kept with its path and key."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str | None, Any]] = []
        self.accepts = True
        self.fails_after = 1000

    def reply(self, path: str) -> tuple[int, Any]:
        if path == "/model_info":
            return 200, {"has_image_understanding": True}
        if path == "/set_internal_state":
            return 200, [True, self.accepts]
        if len(self.seen) > self.fails_after:
            return 500, {"message": "the scheduler has died"}
        report = {"prompt_tokens": 100, "kept_tokens_per_layer": [50.0, 10.0, 30.0, 20.0, 40.0, 5.0]}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "x"},
            "finish_reason": "length",
            "meta_info": {"kv_compression": [report]},
        }
        usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
        return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]} | {
            "usage": usage
        }


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.seen.append((self.path, self.headers.get("authorization"), body))
        status, content = self.server.reply(self.path)
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Not on the console."""


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def measure(fake: Fake) -> None:
    own = OwnServer(f"http://127.0.0.1:{fake.server_port}", "user", "admin", True)
    background._run(config(kv_scope="all"), own, MODEL)


def test_it_measures_writes_and_hands_over(fake: Fake, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    measure(fake)
    written = read_weights(cache)
    assert written.layers == (0.5, 0.1, 0.3, 0.2, 0.4, 0.05)
    assert written.model == model_key(Path(MODEL))
    assert written.measured["prompts"] == {"image": 6, "text": 6}
    (first, *asked, last) = fake.seen
    assert first[:2] == ("/model_info", "Bearer user")
    assert {(path, key) for path, key, _ in asked} == {("/v1/chat/completions", "Bearer user")}
    assert last[:2] == ("/set_internal_state", "Bearer admin")
    assert weights_of(last[2]["server_args"]).digest == written.digest
    start, estimate, done = (line for line in caplog.messages if line.startswith("KV cache"))
    assert "12 prompts (text and image)" in start
    assert "will take about" in estimate
    assert done.endswith(str(cache))


def test_what_takes_too_long_is_left_after_one_prompt(
    fake: Fake, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "MAX_SECONDS", 1e-6)
    measure(fake)
    assert [path for path, *_ in fake.seen] == ["/model_info", "/v1/chat/completions"]
    assert not cache.exists()
    assert "all would take about" in caplog.messages[-1]
    assert "`vlcache calibrate`" in caplog.messages[-1]


def test_a_server_that_ends_in_the_middle_writes_nothing(
    fake: Fake, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fails_after = 4
    measure(fake)
    assert not cache.parent.exists() or not list(cache.parent.iterdir())
    assert "the scheduler has died" in caplog.messages[-1]


def test_schedulers_that_refuse_are_reported(fake: Fake, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake.accepts = False
    measure(fake)
    assert cache.exists(), "the next start may use what was measured"
    assert "a scheduler refused the weights" in caplog.messages[-1]


def test_choices_of_a_gate_need_no_weights() -> None:
    """The process that reads requests only checks them: its choices have no use for what was measured."""
    assert Choices(config()).weights is None
