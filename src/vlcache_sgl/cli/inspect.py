"""`vlcache inspect`: which patches of an image each layer keeps, and what the answer is without the others.

Asks one question at the full cache and compressed, and writes a PNG and an HTML page that needs nothing else: the
image with kept patches per layer, layers against positions, layer budgets, both answers.
"""

from __future__ import annotations

import argparse
import contextlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
from PIL import Image, UnidentifiedImageError
from rich.console import Console

from vlcache_sgl.client.client import Client, said
from vlcache_sgl.client.server import RunningServer, ServerError, interruptible
from vlcache_sgl.client.target import add_target_arguments, target
from vlcache_sgl.evaluation.tasks.receipts import make_receipt
from vlcache_sgl.inspection.layout import read_report
from vlcache_sgl.inspection.page import percents, write_page
from vlcache_sgl.inspection.sheet import draw_sheet

MAX_TOKENS = 64
_SEED, _SIDE = 30_000, 24
"""The image that is shown when none is given: the first one of the demo."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    console = Console()
    try:
        images, question = images_of(arguments)
        flags = ("--kv-policy", arguments.policy or "vlcache", "--kv-budget", arguments.budget or "0.1")
        with interruptible(), target(arguments, flags, console) as server:
            seen = read_report(images=images, **inspect(server, images, question, arguments))
    except (OSError, UnidentifiedImageError, ServerError, ValueError, openai.OpenAIError) as error:
        console.print(f"vlcache inspect: {said(error)}", style="red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    sheet, page = arguments.output.with_suffix(".png"), arguments.output.with_suffix(".html")
    sheet.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(seen, sheet)
    write_page(seen, page)
    console.print(f"full cache: {seen.full_answer}", markup=False)
    console.print(f"{seen.policy}, budget {seen.budget}: {seen.answer}", markup=False)
    if seen.attention:
        shares = percents(seen.attention)
        console.print(f"attention of the full cache's answer on what is kept, by layer: {shares}", soft_wrap=True)
    console.print(f"written: {sheet} and {page}", markup=False)
    return 0


def inspect(
    server: RunningServer, images: Sequence[Image.Image], question: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Ask with the full cache and compressed; what `read_report` wants besides the images, ready for JSON.

    Args:
        arguments: with `policy`, `budget` (None: the server's) and `max_tokens`.

    Raises:
        openai.OpenAIError: when the server refuses the policy or the budget.
    """
    client = Client(server.openai_url)
    state = server.kv_policy()
    policy, budget = arguments.policy or state["policy"], arguments.budget or state["budget"]
    options: dict[str, Any] = {"max_tokens": arguments.max_tokens, "return_meta_info": True}
    params: dict[str, str] = {}
    if arguments.policy:
        params["kv_policy"] = arguments.policy
    if arguments.budget:
        params["kv_budget"] = arguments.budget
    full = None
    with contextlib.suppress(openai.BadRequestError):  # not on a GPU; whatever else is wrong is said to the others
        full = client.ask(question, *images, custom_params={**params, "kv_report": "attention"}, **options)
    if full is None:
        full = client.ask(question, *images, custom_params={"kv_budget": "1.0"}, **options)
    params["kv_report"] = "positions"
    # A prefix of its own: the image is compressed for this question, whoever has asked about it before.
    options.update(custom_params=params, cache_salt=uuid.uuid4().hex)
    answer = client.ask(question, *images, **options)
    return {
        "report": answer.report,
        "question": question,
        "answers": (full.text.strip(), answer.text.strip()),
        "policy": policy,
        "budget": budget,
        "model": Path(str(server.server_info()["model_path"])).name,
        "attention": full.report.get("attention", {}).get("attention_mass", ()),
        "numbers": state["layers"],
    }


def images_of(arguments: argparse.Namespace) -> tuple[list[Image.Image], str]:
    """The images and the question; the demo's first when no image is given."""
    if not arguments.image:
        drawn = make_receipt(_SEED, _SIDE, _SIDE)
        return [drawn.image], arguments.question or drawn.questions[0].text
    return [Image.open(path).convert("RGB") for path in arguments.image], arguments.question or "What is in this image?"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlcache inspect", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--image", nargs="+", metavar="PATH", help="images; default: one that the bundled model knows")
    parser.add_argument("--question", metavar="TEXT", help="what to ask about them")
    parser.add_argument("--policy", help="value of kv_policy; default: the server's, or vlcache")
    parser.add_argument("--budget", help="value of kv_budget; default: the server's, or 0.1")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help=f"of each answer; default: {MAX_TOKENS}")
    parser.add_argument(
        "--output", type=Path, default=Path("out/inspect"), help="path without suffix; default: out/inspect"
    )
    add_target_arguments(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
