"""`vlcache calibrate`: what each layer and KV head of a model needs, measured once, without questions or answers."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
from PIL import Image
from rich.console import Console
from rich.table import Table

from vlcache_sgl._version import __version__
from vlcache_sgl.calibration import BUDGET, POLICY, PROMPTS, CalibrationError, Shares, calibrate, samples
from vlcache_sgl.cli.client import Client, said
from vlcache_sgl.cli.console import table_console
from vlcache_sgl.cli.server import RunningServer, ServerError, interruptible
from vlcache_sgl.cli.target import add_target_arguments, target
from vlcache_sgl.weights import ModelWeights, cache_file, checkpoint_folder, model_key

FLAGS = ("--kv-policy", POLICY, "--kv-budget", f"{BUDGET:g}", "--kv-scope", "all", "--kv-head-cells")
"""Of a server that is started here."""
KINDS = ("text", "image")
_WIDTH = 100
_BAR = 40
"""Columns of a weight of 1 in the table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the calibration; returns the exit code."""
    arguments = _parser().parse_args(argv)
    console = table_console(_WIDTH)
    try:
        if arguments.prompts < 1:
            raise CalibrationError(f"--prompts must be a whole number from 1, got {arguments.prompts}")
        with interruptible(), target(arguments, FLAGS, console) as server:
            weights, path = _measure(server, arguments, console)
    except (CalibrationError, ServerError, ValueError) as error:
        console.print(f"vlcache calibrate: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    command = shlex.join(["vlcache", "calibrate", *(sys.argv[1:] if argv is None else argv)])
    weights = replace(weights, measured={**weights.measured, "command": command, "version": __version__})
    weights.write(path)
    console.print(layer_table(weights))
    console.print(f"written: {path}", soft_wrap=True)
    if arguments.output is None:
        console.print("servers of this model use it from their next start on (--kv-weights auto)")
    else:
        console.print(f"to use it: --kv-weights {path}", soft_wrap=True)
    return 0


def _measure(server: RunningServer, arguments: argparse.Namespace, console: Console) -> tuple[ModelWeights, Path]:
    """The weights, and where they belong."""
    served = str(server.server_info()["model_path"])
    folder = checkpoint_folder(served)
    if folder is None and arguments.output is None:
        raise CalibrationError(f"the files of {served} are not on this machine; name a file with --output")
    key = "" if folder is None else model_key(folder)
    kinds = arguments.kind or _kinds(server)
    prompts = list(samples(arguments.prompts, texts="text" in kinds, images="image" in kinds))
    console.print(f"{len(prompts)} prompts ({' and '.join(kinds)}), each read twice")
    taken: list[float] = []

    def note(_: Shares, seconds: float) -> None:
        taken.append(seconds)
        if len(taken) == 1:
            console.print(f"one takes {seconds:.1f} s: about {seconds * len(prompts) / 60:.1f} min")

    return calibrate(asker(server.openai_url), prompts, key, note), arguments.output or cache_file(key)


def _kinds(server: RunningServer) -> Sequence[str]:
    """What the model reads and the server compresses."""
    try:
        info = httpx.get(f"{server.url}/model_info", timeout=30).raise_for_status().json()
        scope = server.kv_policy()["scope"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise CalibrationError(f"{server.url} does not say what it serves: {error}") from error
    kinds = [
        kind for kind, used in zip(KINDS, (scope == "all", info.get("has_image_understanding")), strict=True) if used
    ]
    if not kinds:
        raise CalibrationError("the model reads no images, and the server compresses no texts (--kv-scope all)")
    return kinds


def asker(openai_url: str) -> Any:
    """How `vlcache_sgl.calibration` asks a server at this URL."""
    client = Client(openai_url)

    def ask(text: str, images: Sequence[Image.Image], body: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            answer = client.ask(text, *images, max_tokens=1, return_meta_info=True, **body)
        except openai.OpenAIError as error:
            raise CalibrationError(f"the server refused a prompt: {said(error)}") from error
        return answer.report

    return ask


def layer_table(weights: ModelWeights) -> Table:
    """A row per layer: its weight, a bar, and the weights of its heads."""
    table = Table("layer", "weight", "", "KV heads")
    for index, weight in enumerate(weights.layers):
        heads = " ".join(f"{share:.2f}" for share in weights.heads[index]) if weights.heads else ""
        table.add_row(str(index), f"{weight:.3f}", "█" * round(weight * _BAR), heads)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlcache calibrate",
        description=(
            "Measures what each layer and KV head of a model needs, on bundled prompts and without labels, for "
            "--kv-weights. KV heads are measured where the server has cells per head (--kv-head-cells), as one that "
            "is started here has."
        ),
    )
    add_target_arguments(parser)
    group = parser.add_argument_group("the measurement")
    group.add_argument("--prompts", type=int, default=PROMPTS, help=f"of each kind; default: {PROMPTS}")
    group.add_argument("--kind", nargs="+", choices=KINDS, help="default: what the server compresses")
    group.add_argument(
        "--output", type=Path, metavar="FILE", help="default: the user's cache, where --kv-weights auto looks"
    )
    return parser
