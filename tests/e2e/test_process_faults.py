"""What happens around the server's processes: one is killed, all are told to end, the log has no room."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from vlcache_sgl.client.client import Client, data_url
from vlcache_sgl.client.server import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/tinyvlm/grounded"
FLAGS = (
    *("--dtype", "float32", "--chunked-prefill-size", "256", "--max-total-tokens", "16384"),
    *("--skip-server-warmup", "--sleep-on-idle", "--kv-policy", "vlcache", "--kv-budget", "0.1"),
)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
GONE_S = 60.0
"""Within which everything has ended after a signal."""


def body(images: list[Any], tokens: int, **fields: Any) -> dict[str, Any]:
    prompt = f"<|im_start|>user\n{IMAGE * len(images)}red K?<|im_end|>\n<|im_start|>assistant\n"
    sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"text": prompt, "image_data": [data_url(i) for i in images], "sampling_params": sampling, **fields}


def processes(server: ServerProcess) -> list[psutil.Process]:
    assert server._process is not None
    root = psutil.Process(server._process.pid)
    return [root, *root.children(recursive=True)]


def assert_all_end(members: list[psutil.Process], timeout_s: float = GONE_S) -> None:
    """A zombie has ended: it waits for its parent only."""

    def living() -> list[psutil.Process]:
        return [p for p in members if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    deadline = time.monotonic() + timeout_s
    while living():
        assert time.monotonic() < deadline, f"still running: {living()}"
        time.sleep(0.1)


def wait_for_log(server: ServerProcess, text: str, timeout_s: float = 60.0) -> None:
    assert server.log_path is not None
    deadline = time.monotonic() + timeout_s
    while text not in server.log_path.read_text(errors="replace"):
        assert time.monotonic() < deadline, f"{text!r} was not logged"
        time.sleep(0.02)


def assert_answers(server: ServerProcess, picture: Any) -> None:
    drawn = [picture(8300 + i) for i in range(3)]
    client = Client(server.openai_url)
    assert sum(client.ask(d.questions[0].text, d.image).text == d.questions[0].answer for d in drawn) >= 2
    assert server.kv_policy()["requests_compressed"] >= 3


def test_scheduler_killed_in_mid_request_and_sigterm_in_prefill(picture: Any) -> None:
    """The client gets an error and no process is left; a server started again serves; told to end, it ends cleanly."""
    server = ServerProcess(MODEL, FLAGS, title="to be killed")
    try:
        server.start()
        members = processes(server)
        (scheduler,) = (p for p in members if "sglang::scheduler" in " ".join(p.cmdline()) or "scheduler" in p.name())
        lines = 0
        broken = False
        try:
            request = body([picture(8310).image], 4000, stream=True)
            with httpx.stream("POST", f"{server.url}/generate", json=request, timeout=GONE_S) as reply:
                for line in reply.iter_lines():
                    lines += line.startswith("data:")
                    if lines == 5:
                        scheduler.kill()
                    broken = broken or '"error"' in line or '"abort"' in line
        except httpx.TransportError:
            broken = True
        assert 5 <= lines < 4000
        assert broken, "the stream ended as if the answer were complete"
        assert_all_end(members)
    finally:
        server.stop()

    server = ServerProcess(MODEL, FLAGS, title="started again")
    try:
        server.start()
        assert_answers(server, picture)
        members = processes(server)
        replies: list[httpx.Response | Exception] = []

        def send() -> None:
            large = [picture(8320 + i, 32, 32).image for i in range(6)]
            try:
                replies.append(httpx.post(f"{server.url}/generate", json=body(large, 4), timeout=4 * GONE_S))
            except httpx.TransportError as error:
                replies.append(error)

        sender = threading.Thread(target=send)
        sender.start()
        wait_for_log(server, "#new-token: 256")
        os.kill(members[0].pid, signal.SIGTERM)
        sender.join(4 * GONE_S)
        assert not sender.is_alive()
        (ending,) = replies
        if isinstance(ending, httpx.Response) and ending.status_code == 200:
            assert ending.json()["meta_info"]["completion_tokens"] == 4  # drained: all of it
        assert_all_end(members)
        assert server.log_path is not None
        assert "leak detected" not in server.log_path.read_text(errors="replace")
    finally:
        server.stop()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_no_room_for_the_log(picture: Any, tmp_path: Path) -> None:
    """From some moment on every write to standard output and error fails: the server goes on answering, and ends."""
    switch = tmp_path / "full"
    inherited = os.environ.get("PYTHONPATH")
    plugin = str(Path(__file__).parent / "plugins/full_disk")
    env = {
        "PYTHONPATH": os.pathsep.join([plugin, *([inherited] if inherited else [])]),
        "VLCACHE_TEST_FULL": str(switch),
    }
    server = ServerProcess(MODEL, FLAGS, title="mute", env=env)
    with server:
        assert_answers(server, picture)
        switch.touch()
        time.sleep(1)
        assert server.log_path is not None
        length = server.log_path.stat().st_size
        bad = body([], 1)
        bad["sampling_params"]["custom_params"] = {"kv_budget": 7.5}
        assert httpx.post(f"{server.url}/generate", json=bad, timeout=60).status_code == 400
        server.flush_cache()
        assert_answers(server, picture)
        assert server.kv_policy()["integrity"] == []
        assert server.log_path.stat().st_size == length  # nothing of all that could be written
        members = processes(server)
    assert_all_end(members, 5)
