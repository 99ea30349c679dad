"""Starts many servers from one process that has imported SGLang once: it takes 17 s on two cores.

A process of its own runs this file; it reads one JSON object per line and answers each with one.  ``{"start":
[arguments], "log": path, "env": {}}`` forks a child that runs `python -m sglang.launch_server` with these arguments and
answers ``{"pid": number}``; ``{"poll": pid}`` answers ``{"code": exit code or null}``.  The child's scheduler is forked
as well, where SGLang would start Python anew.  `--load-format dummy` makes the weights of `models/tiny/weights.py`.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import sys
import types
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.engine",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
)
"""Beside the models: what a server's process and its scheduler import."""


def start(arguments: list[str], log: str, env: dict[str, str]) -> int:
    """The process number of a server that begins to start, in a session of its own."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(env)
        if "PYTHONPATH" in env:
            sys.path[:0] = env["PYTHONPATH"].split(os.pathsep)
        sys.argv = ["launch_server.py", *arguments]
        runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(order: dict[str, Any]) -> dict[str, Any]:
    if "start" in order:
        return {"pid": start(order["start"], order["log"], order["env"])}
    pid, status = os.waitpid(order["poll"], os.WNOHANG)
    return {"code": os.waitstatus_to_exitcode(status) if pid else None}


class Spreading(types.ModuleType):
    """`sglang.srt.models.utils`, with all models imported: what a policy replaces there, it replaces in them."""

    def __setattr__(self, name: str, value: Any) -> None:
        before = vars(self).get(name)
        super().__setattr__(name, value)
        for module in list(sys.modules.values()):
            if before is not None and vars(module).get(name) is before:
                vars(module)[name] = value


def prepare() -> None:
    """Import what a server and its scheduler import, and let schedulers be forked."""
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")
    for module in IMPORTED:
        importlib.import_module(module)
    from sglang.srt.model_loader import loader
    from sglang.srt.models import utils
    from sglang.srt.models.registry import ModelRegistry

    from models.tiny.weights import random_weights

    ModelRegistry.get_supported_archs()
    utils.__class__ = Spreading
    loader.initialize_dummy_weights = random_weights
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None


if __name__ == "__main__":
    # What is printed while importing is not an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
