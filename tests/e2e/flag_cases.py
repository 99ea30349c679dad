"""Start `python -m sglang.launch_server` with many sets of flags, importing SGLang once: it takes 17 s on two cores.

Reads a JSON list of argument lists from standard input and writes a JSON list of `{code, out, err}`.  Each case runs
in a fork that executes the module as `__main__`; one that has not ended after TIMEOUT_S is killed, its code is null.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import tempfile
import time
import warnings
from typing import Any

TIMEOUT_S = 60


def run(arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 0
            try:
                sys.argv = ["launch_server.py", *arguments]
                runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = None
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.05)
        else:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for file in (out, err):
            file.seek(0)
        return {"code": code, "out": out.read(), "err": err.read()}


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    warnings.simplefilter("ignore")
    import sglang.launch_server
    import sglang.srt.entrypoints.engine  # noqa: F401  what all cases need, loaded once

    print(json.dumps([run(case) for case in cases]))
