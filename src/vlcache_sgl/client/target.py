"""The server that a command talks to: one that it starts for itself, or the one at `--base-url`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from rich.console import Console

from vlcache_sgl.client.bundled import bundled_model
from vlcache_sgl.client.server import BUNDLED_FLAGS, RunningServer, ServerError, ServerProcess
from vlcache_sgl.weights import measured_file


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--server-flags`, or `--base-url`."""
    group = parser.add_argument_group("the server")
    group.add_argument("--base-url", metavar="URL", help="a running server, as http://127.0.0.1:30000")
    group.add_argument("--model", metavar="PATH", help="what to serve; default: the bundled model")
    group.add_argument("--server-flags", metavar="FLAGS", default="", help="further flags of `sglang serve`, in quotes")


def _model_problem(model: str) -> str | None:
    """Why nothing can be served, as far as it shows without a server; names on a hub pass."""
    path = Path(model)
    if path.is_dir():
        return None if (path / "config.json").exists() else "no config.json in this folder"
    is_path = path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2
    return "no such folder" if is_path and not path.exists() else None


@contextlib.contextmanager
def target(arguments: argparse.Namespace, flags: Sequence[str], console: Console) -> Iterator[RunningServer]:
    """The server, ready; one that was started here is ended afterwards.

    Args:
        flags: for a server that is started here; the user's `--server-flags` come after them.

    Raises:
        ServerError: when it does not answer, or serves without a policy.
    """
    if arguments.base_url:
        for flag, given in (("--model", arguments.model), ("--server-flags", arguments.server_flags)):
            if given:
                raise ServerError(f"{flag} is for a server that is started here, --base-url names a running one")
        server = RunningServer(arguments.base_url)
        try:
            state = server.kv_policy()
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise ServerError(f"no SGLang server answers at {server.url}: {error}") from error
        if not state:
            raise ServerError(f"the server at {server.url} runs without --kv-policy")
        yield server
        return
    model = arguments.model or bundled_model()
    if arguments.model is None and not (Path(model) / "config.json").exists():
        raise ServerError(f"no model at {model}; name one with --model PATH")
    if arguments.model is not None and (problem := _model_problem(arguments.model)):
        raise ServerError(f"--model {arguments.model}: {problem}")
    common = BUNDLED_FLAGS if arguments.model is None else ("--enable-cache-report",)
    known = measured_file(str(model))
    weights = () if known is None else ("--kv-weights", str(known))
    given = [*common, *flags, *weights, *arguments.server_flags.split()]
    with ServerProcess(model, given, title="server", console=console) as process:
        yield process
