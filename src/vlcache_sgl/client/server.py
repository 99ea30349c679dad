"""A real SGLang server as a child process: started, waited for, and ended with everything it started.

SGLang is never imported here: the server runs in its own interpreter, exactly as a user would start it, so that what
the demo, the benchmark and the end-to-end tests see is what a user gets.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import httpx
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.markup import escape

LOOPBACK = "127.0.0.1"
BUNDLED_FLAGS = (
    *("--dtype", "float32", "--max-total-tokens", "65536"),
    *("--enable-cache-report", "--skip-server-warmup", "--sleep-on-idle"),
)
"""For the bundled model on a CPU: exact arithmetic, a pool that fits a laptop, no busy core while idle."""
_POLL_S = 0.25
_TERM_GRACE_S = 10.0
"""After SIGTERM, before SIGKILL: SGLang's own shutdown takes one to five seconds."""
_KILL_GRACE_S = 10.0
_TAIL_LINES = 30


class ServerError(RuntimeError):
    """The server did not start, died, or could not be ended; the message holds the end of its log."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


class ChildProcess(Protocol):
    """What is asked of the process of a server."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...


class RunningServer:
    """A server that answers at `url`, whoever has started it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.openai_url = f"{self.url}/v1"

    def server_info(self) -> dict[str, Any]:
        """What `GET /server_info` answers."""
        response = httpx.get(f"{self.url}/server_info", timeout=60.0)
        response.raise_for_status()
        info: dict[str, Any] = response.json()
        return info

    def kv_policy(self) -> dict[str, Any]:
        """The object `kv_policy` of the first scheduler; empty for a server without a policy."""
        state: dict[str, Any] = self.server_info()["internal_states"][0].get("kv_policy") or {}
        return state

    def flush_cache(self, timeout_s: float = 30.0) -> None:
        """Empty the prefix cache, waiting until no request is running."""
        response = httpx.post(f"{self.url}/flush_cache", params={"timeout": timeout_s}, timeout=timeout_s + 30.0)
        response.raise_for_status()


class ServerProcess(RunningServer):
    """`python -m sglang.launch_server` on a free loopback port, in a session and process group of its own.

    Used as a context manager it is ready inside the block and gone after it, whatever happened in between::

        with ServerProcess("models/tinyvlm/grounded", ["--kv-policy", "vlcache", "--kv-budget", "0.1"]) as server:
            client = openai.OpenAI(base_url=server.openai_url, api_key="none")

    `launch` and `wait_until_ready` are separate so that two servers can load side by side.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        flags: Sequence[str] = (),
        *,
        title: str = "SGLang",
        env: Mapping[str, str] | None = None,
        timeout_s: float = 300.0,
        console: Console | None = None,
    ) -> None:
        """Describe a server; nothing is started yet.

        Args:
            model: path or name, given to `--model-path`.
            flags: further flags of `sglang serve`; a policy's weights are off unless ``--kv-weights`` is among them.
            title: how progress and errors call it.
            env: variables added to this process's environment.
            timeout_s: seconds from launch to ready.
            console: where progress goes; None for none.
        """
        self.title = title
        self.port = free_port()
        super().__init__(f"http://{LOOPBACK}:{self.port}")
        self.command = [sys.executable, "-m", "sglang.launch_server", "--model-path", os.fspath(model)]
        self.command += ["--host", LOOPBACK, "--port", str(self.port), *flags]
        names = {flag.partition("=")[0] for flag in flags}
        if "--kv-policy" in names and "--kv-weights" not in names:
            # Who measures answers or times must not meet a server that measures its model meanwhile.
            self.command += ["--kv-weights", "off"]
        self._env = {**os.environ, **(env or {})}
        self._timeout_s = timeout_s
        self._console = console
        self._process: ChildProcess | None = None
        self._launched_at = 0.0
        self._work_dir: Path | None = None
        self.log_path: Path | None = None
        """Standard output and error of the server; removed by a `stop` that followed no failure."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(keep_log=isinstance(error, Exception))

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Launch and wait until a token has been generated; on any failure nothing is left running."""
        try:
            self.launch()
            self.wait_until_ready()
        except BaseException as error:
            # The text of a ServerError holds the end of the log, and its first line the path of the whole.
            self.stop(keep_log=isinstance(error, ServerError))
            raise

    def launch(self) -> None:
        """Start the process and return at once."""
        if self._process is not None:
            raise ServerError(f"{self.title} was launched already")
        self._work_dir = Path(tempfile.mkdtemp(prefix="vlcache-"))
        self.log_path = self._work_dir / "server.log"
        # SGLang leaves socket files behind in its temporary directory: give it ours, which goes away as a whole.
        # Threads of several processes share the cores: one that spins at a barrier takes the time of the others.
        env = {"OMP_WAIT_POLICY": "PASSIVE", **self._env, "TMPDIR": str(self._work_dir), "PYTHONUNBUFFERED": "1"}
        self._process = self._spawn(self.log_path, env)
        self._launched_at = time.monotonic()

    def _spawn(self, log_path: Path, env: Mapping[str, str]) -> ChildProcess:
        """Run `command` in a session of its own."""
        with log_path.open("wb") as log:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Return once `/health_generate` answers; raise ServerError when the server exits first or takes too long."""
        with self._progress() as say, httpx.Client(base_url=self.url, timeout=30.0) as http:
            while True:
                self._raise_if_dead()
                waited = time.monotonic() - self._launched_at
                if waited > self._timeout_s:
                    raise ServerError(self._failure(f"was not ready after {waited:.0f} s"))
                say(f"{self.title}: {waited:.0f} s  {self._last_line()}")
                with contextlib.suppress(httpx.TransportError):
                    if http.get("/health_generate").status_code == 200:
                        break
                time.sleep(_POLL_S)
        if self._console is not None:
            self._console.print(f"{self.title}: ready after {time.monotonic() - self._launched_at:.0f} s")

    def stop(self, keep_log: bool = False) -> None:
        """End the whole process group, SIGTERM first, then SIGKILL, and make sure that nothing is left.  Idempotent.

        Raises ServerError when a process survives even that.
        """
        process = self._process
        if process is None:
            return
        with _no_interrupts():
            members = self._members()
            left = members
            for number, grace_s in ((signal.SIGTERM, _TERM_GRACE_S), (signal.SIGKILL, _KILL_GRACE_S)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                for member in left:  # those that left the group
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.send_signal(number)
                left = self._wait_for_end(members, grace_s)
                if not left:
                    break
            if not left:
                self._process = None
                if self._work_dir is not None and not keep_log:
                    shutil.rmtree(self._work_dir, ignore_errors=True)
        if left:
            raise ServerError(f"{self.title}: could not end {', '.join(str(member) for member in left)}")

    def memory_bytes(self) -> int:
        """Resident memory of all processes of the server."""
        total = 0
        for member in self._members():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += int(member.memory_info().rss)
        return total

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """The last lines of the server's log."""
        return "\n".join(self._log().splitlines()[-lines:])

    def _log(self) -> str:
        if self.log_path is None or not self.log_path.exists():
            return ""
        return self.log_path.read_text(errors="replace")

    def _last_line(self) -> str:
        lines = [line for line in self._log().splitlines() if line.strip()]
        return lines[-1][:90] if lines else ""

    def _failure(self, what: str) -> str:
        return f"{self.title} {what} (log: {self.log_path})\n$ {shlex.join(self.command)}\n{self.log_tail()}"

    def _raise_if_dead(self) -> None:
        if self._process is None:
            raise ServerError(f"{self.title} was not launched")
        if (code := self._process.poll()) is not None:
            raise ServerError(self._failure(f"exited with code {code}"))

    def _members(self) -> list[psutil.Process]:
        """Every living process of the server: its descendants, and whoever is in its session."""
        assert self._process is not None
        found: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            found = {member.pid: member for member in [root, *root.children(recursive=True)]}
        for member in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(member.pid) == self._process.pid:
                    found[member.pid] = member
        return [member for member in found.values() if _alive(member)]

    def _wait_for_end(self, members: list[psutil.Process], grace_s: float) -> list[psutil.Process]:
        """Those of `members`, and of the server's session, that live on after `grace_s` seconds."""
        assert self._process is not None
        deadline = time.monotonic() + grace_s
        while True:
            self._process.poll()  # reaps it
            left = {member.pid: member for member in [*members, *self._members()] if _alive(member)}
            if not left or time.monotonic() > deadline:
                return list(left.values())
            time.sleep(0.1)

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Any]:
        if self._console is None:
            yield lambda text: None
            return
        with self._console.status(f"{self.title}: starting") as status:
            yield lambda text: status.update(escape(text))


def _alive(process: psutil.Process) -> bool:
    """False for a zombie too: it holds no memory and waits for its parent, which may be a container's lazy init."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Let an impatient second Ctrl-C wait until the servers are gone.  Does nothing outside the main thread."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM and SIGHUP unwind the stack like Ctrl-C, so that `with ServerProcess(...)` cleans up."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
