"""Real servers for the tests of this folder, started when first needed, shared between files, two alive at most.

A test asks for `stock`, `ours_tenth` or `small`, or takes `servers` and describes one of its own.  Tests are
ordered by the servers they use, so that each of the shared ones starts once in a run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from nursery import ForkedServer, Nursery
from PIL import Image
from rich.console import Console

from vlcache_sgl.client.client import Answer, Client
from vlcache_sgl.client.server import ServerError, ServerProcess
from vlcache_sgl.evaluation.tasks.receipts import Receipt, make_receipt

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/tinyvlm/grounded"
MAX_ALIVE = 2
"""A small server costs 1.5 to 3 GB and a share of two cores."""

FLAGS = (
    # float32: equality is exact.  512: prompts of the larger images take two or three chunks.
    *("--dtype", "float32", "--chunked-prefill-size", "512", "--max-total-tokens", "65536"),
    *("--max-running-requests", "32", "--enable-cache-report", "--skip-server-warmup"),
    "--sleep-on-idle",  # the scheduler of an idle server would keep one of the two cores busy
)
TROUBLE = re.compile(r"leak detected|double free|use-after-free|hit an exception", re.IGNORECASE)
"""What SGLang logs when a process dies or its idle check finds tokens missing; other tracebacks are harmless."""
TENTH = ("--kv-policy", "vlcache", "--kv-budget", "0.1", "--enable-metrics")
"""The server of most tests; the flag adds `/metrics`."""


@dataclass(frozen=True)
class Ask:
    """A request as data, so that two servers can be sent the same one; fields as in `Client.ask`."""

    turns: Any
    images: tuple[Image.Image, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Server:
    """One running server, as tests see it."""

    def __init__(self, process: ServerProcess) -> None:
        self.process = process
        self.url = process.url
        self.client = Client(process.openai_url)

    def ask(self, turns: Any, *images: Image.Image, **options: Any) -> Answer:
        """See `Client.ask`."""
        return self.client.ask(turns, *images, **options)

    def ask_all(self, asks: Sequence[Ask], at_once: int = 1) -> list[Answer]:
        """Answers in the order of `asks`, at most `at_once` requests in flight."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda ask: self.ask(ask.turns, *ask.images, **ask.options), asks))

    def ask_together(self, asks: Sequence[Ask]) -> list[Answer]:
        """All at the same moment."""
        gate = threading.Barrier(len(asks))

        def send(ask: Ask) -> Answer:
            gate.wait()
            return self.ask(ask.turns, *ask.images, **ask.options)

        with ThreadPoolExecutor(len(asks)) as pool:
            return list(pool.map(send, asks))

    @contextlib.contextmanager
    def retracting(self, every_s: float) -> Iterator[None]:
        """Meanwhile all requests are retracted again and again, at whatever moment it comes."""
        done = threading.Event()

        def interrupt() -> None:
            while not done.wait(every_s):
                for call in ("pause_generation", "continue_generation"):
                    httpx.post(f"{self.url}/{call}", json={"mode": "retract"}, timeout=60).raise_for_status()

        with ThreadPoolExecutor(1) as pool:
            interrupting = pool.submit(interrupt)
            try:
                yield
            finally:
                done.set()
                interrupting.result()

    def kv_state(self) -> dict[str, Any]:
        """`kv_policy` of `/server_info`, its books checked: every cell is used or free."""
        state = self.process.kv_policy()
        if state:
            assert state["cells_used"] + state["cells_free"] == state["cells_total"], state
        return state

    def settled(self) -> dict[str, Any]:
        """`kv_state` once two readings agree: the host learns of freed cells one step late."""
        state = self.kv_state()
        for _ in range(50):
            time.sleep(0.05)
            before, state = state, self.kv_state()
            if state == before:
                return state
        raise AssertionError(f"the books do not come to rest: {state}")

    def flush(self) -> None:
        """Empty the prefix cache once nothing runs; fails when something hangs."""
        self.process.flush_cache()

    @property
    def log(self) -> str:
        assert self.process.log_path is not None
        return self.process.log_path.read_text(errors="replace")

    def assert_nothing_held(self) -> None:
        """When everybody has gone and the cache is flushed, every cell, slot and row of host memory is free."""
        self.flush()
        state = self.settled()
        assert state["cells_used"] == state["host_tokens_used"] == 0
        assert state["virtual_slots_free"] == state["virtual_slots_total"]
        assert state["integrity"] == []
        self.assert_alive()

    def assert_alive(self) -> None:
        """The server answers and its scheduler has reported no leak and no crash."""
        assert self.process.running
        assert self.ask("red K?", max_tokens=1).completion_tokens == 1
        assert not TROUBLE.search(self.log), self.process.log_tail(60)


class Servers:
    """At most MAX_ALIVE running servers by description; a further one ends the one that was used least recently."""

    def __init__(self, console: Console | None, process: Callable[..., ServerProcess] = ServerProcess) -> None:
        self._console = console
        self._process = process
        self._alive: dict[tuple[Any, ...], Server] = {}

    def get(
        self,
        *flags: str,
        model: str | os.PathLike[str] = MODEL,
        common: Sequence[str] = FLAGS,
        env: Mapping[str, str] | None = None,
    ) -> Server:
        """The running server with these flags after the common ones, started if need be."""
        key = (os.fspath(model), *common, *flags, *sorted((env or {}).items()))
        server = self._alive.pop(key, None)
        if server is not None and not server.process.running:
            server.process.stop()
            server = None
        if server is None:
            while len(self._alive) >= MAX_ALIVE:
                self._alive.pop(next(iter(self._alive))).process.stop()
            title = " ".join(flags) or "stock"
            process = self._process(model, [*common, *flags], title=title, env=env, console=self._console)
            process.start()
            server = Server(process)
        self._alive[key] = server  # last = used most recently
        return server

    def close(self) -> None:
        """End them all, the second even if the first resists."""
        errors = []
        while self._alive:
            _, server = self._alive.popitem()
            try:
                server.process.stop()
            except ServerError as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("servers that could not be ended", errors)


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    verbose = request.config.get_verbosity() > 0
    pool = Servers(Console() if verbose else None)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture(scope="session")
def forked_servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    """The same, each forked from one process that has imported SGLang: for tests with many servers of little work.

    `--load-format dummy` makes weights that attention depends on.
    """
    verbose = request.config.get_verbosity() > 0
    nursery = Nursery()
    pool = Servers(Console() if verbose else None, functools.partial(ForkedServer, nursery))
    try:
        yield pool
    finally:
        pool.close()
        nursery.close()


@pytest.fixture
def stock(servers: Servers) -> Server:
    """SGLang with the plugin installed and no policy asked for."""
    return servers.get()


@pytest.fixture
def ours_tenth(servers: Servers) -> Server:
    """`--kv-policy vlcache --kv-budget 0.1`, with metrics."""
    return servers.get(*TENTH)


SMALL = (
    *("--kv-policy", "vlcache:density", "--kv-budget", "0.1", "--kv-min-tokens", "16"),
    *("--kv-host-memory", "16MB", "--kv-overcommit", "4", "--kv-recall", "24"),
    *("--max-total-tokens", "1028", "--chunked-prefill-size", "128"),
)
"""An arena for one image of the larger ones and little beside it, host memory for nine of them; an
eighth of the memory goes into sketches."""


@pytest.fixture
def small_flags() -> tuple[str, ...]:
    """Of `small`."""
    return SMALL


@pytest.fixture
def small(servers: Servers, broken_policies: dict[str, str]) -> Server:
    """A server whose arena a few requests fill, with the policy that the bundled model was trained for; empty."""
    server = servers.get(*SMALL, env=broken_policies)
    server.flush()
    return server


LIMITS = (
    *("--kv-policy", "vlcache", "--kv-budget", "0.3", "--kv-scope", "all"),
    *("--kv-budget-min", "0.2", "--kv-budget-max", "0.5", "--kv-allow-policies", "snapkv,knorm"),
)


@pytest.fixture
def limited(servers: Servers) -> Server:
    """A server that lets requests choose little, and compresses texts too."""
    return servers.get(*LIMITS)


BY_HEAD = (*("--kv-policy", "snapkv:heads=split", "--kv-budget", "0.2", "--kv-head-cells", "--kv-scope", "all"),)


@pytest.fixture
def by_head(servers: Servers) -> Server:
    """A server with cells per KV head, whose default policy splits a budget between heads; empty."""
    server = servers.get(*BY_HEAD)
    server.flush()
    return server


PLUGINS = Path(__file__).parent / "plugins"
EXAMPLE = ROOT / "examples/third_party_policy"


def with_paths(*folders: Path) -> dict[str, str]:
    """The environment in which the distributions of these folders count as installed."""
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), *([inherited] if inherited else [])])}


def _installer() -> list[str]:
    """pip of this environment, or the uv that made it."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--quiet"]
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        pytest.skip("neither pip nor uv")
    return [uv, "pip", "install", "--quiet", "--offline", "--python", sys.executable]


@pytest.fixture(scope="session")
def broken_policies() -> dict[str, str]:
    """The environment of processes for which the policies of `plugins/broken_policies` are installed."""
    return with_paths(PLUGINS / "broken_policies")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes for which the package of `examples/third_party_policy` is installed, and the broken
    policies of `plugins/` too.  Built and installed as users would; nothing is fetched, nothing stays."""
    pytest.importorskip("hatchling", reason="`make setup` installs it")
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "package")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(wheels)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    install = [*_installer(), "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    assert (target / "vlcache_edges.py").exists()
    return with_paths(target, PLUGINS / "broken_policies")


@pytest.fixture
def foreign(servers: Servers, installed: dict[str, str]) -> Server:
    """A server whose default policy is another distribution's, and for which broken policies are installed."""
    return servers.get("--kv-policy", "edges:power=2", "--kv-budget", "0.2", env=installed)


@functools.cache
def _picture(seed: int, rows: int, cols: int, num_questions: int) -> Receipt:
    return make_receipt(seed, rows, cols, num_questions=num_questions)


@pytest.fixture(scope="session")
def picture() -> Any:
    """`picture(seed, rows=16, cols=16, num_questions=4)`: a held-out receipt, drawn once."""

    def draw(seed: int, rows: int = 16, cols: int = 16, num_questions: int = 4) -> Receipt:
        return _picture(seed, rows, cols, num_questions)

    return draw


@pytest.fixture(scope="session")
def an_ask() -> type[Ask]:
    """The class `Ask`: test modules cannot import from a conftest."""
    return Ask


_ORDER = ("small", "ours_tenth", "stock", "by_head", "limited", "foreign", "servers", "forked_servers")
"""Tests run in the order of the first of these that they use.  Neighbours are alive together, and some tests use two of
them: with another order servers would start twice."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark and order the tests of this folder; all others stay where they are, before these."""
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        if here not in item.path.parents:
            return -1
        item.add_marker(pytest.mark.e2e)
        names = getattr(item, "fixturenames", ())
        return next((place for place, name in enumerate(_ORDER) if name in names), len(_ORDER))

    items.sort(key=place)
