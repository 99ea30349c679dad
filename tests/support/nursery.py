"""Servers that are forked from one process that has imported SGLang: it runs `server_nursery.py`, which says how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlcache_sgl.client.server import ChildProcess, ServerProcess

PROGRAM = Path(__file__).with_name("server_nursery.py")


class Nursery:
    """The process that servers are forked from; started when first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer to an order, as `server_nursery.py` describes them."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            assert self._read() == {"ready": True}
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End it; its servers have been stopped before."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class Forked:
    """A process that the nursery has forked and reaps."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self._nursery = nursery
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._nursery.ask(poll=self.pid)["code"]
        return self._code


class ForkedServer(ServerProcess):
    """A server whose Python has SGLang already.

    Args:
        nursery: forks it.
        others: as for `ServerProcess`.
    """

    def __init__(self, nursery: Nursery, *others: Any, **named: Any) -> None:
        super().__init__(*others, **named)
        self._nursery = nursery

    def _spawn(self, log_path: Path, env: Mapping[str, str]) -> ChildProcess:
        arguments = self.command[self.command.index("--model-path") :]
        # What this process has is what the nursery has inherited.
        own = {name: value for name, value in env.items() if os.environ.get(name) != value}
        return Forked(self._nursery, self._nursery.ask(start=arguments, log=str(log_path), env=own)["pid"])
