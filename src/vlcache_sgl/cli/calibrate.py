"""`vlcache calibrate`: what each layer and KV head of a model needs, measured once, without questions or answers."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from vlcache_sgl._version import __version__
from vlcache_sgl.cli.console import table_console
from vlcache_sgl.client.client import Client
from vlcache_sgl.client.server import RunningServer, ServerError, interruptible
from vlcache_sgl.client.target import add_target_arguments, target
from vlcache_sgl.evaluation.calibration import (
    BUDGET,
    KINDS,
    POLICY,
    PROMPTS,
    CalibrationError,
    Shares,
    asker,
    calibrate,
    kinds,
    samples,
)
from vlcache_sgl.weights import ModelWeights, cache_file, checkpoint_folder, model_key

FLAGS = ("--kv-policy", POLICY, "--kv-budget", f"{BUDGET:g}", "--kv-scope", "all", "--kv-head-cells")
"""Flags of a server that is started here."""
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
    asked = arguments.kind or _kinds(server)
    prompts = list(samples(arguments.prompts, asked))
    console.print(f"{len(prompts)} prompts ({' and '.join(asked)}), each read twice")
    taken: list[float] = []

    def note(_: Shares, seconds: float) -> None:
        taken.append(seconds)
        if len(taken) == 1:
            console.print(f"one takes {seconds:.1f} s: about {seconds * len(prompts) / 60:.1f} min")

    return calibrate(asker(Client(server.openai_url)), prompts, key, note), arguments.output or cache_file(key)


def _kinds(server: RunningServer) -> Sequence[str]:
    """What the model reads and the server compresses."""
    try:
        info = httpx.get(f"{server.url}/model_info", timeout=30).raise_for_status().json()
        return kinds(server.kv_policy()["scope"], bool(info.get("has_image_understanding")))
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise CalibrationError(f"{server.url} does not say what it serves: {error}") from error


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
