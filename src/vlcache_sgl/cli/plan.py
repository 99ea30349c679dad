"""`vlcache plan`: how many requests and images fit into a GPU, uncompressed and compressed, without starting anything.

The figures come from the arithmetic by which the server sizes its pools and admits requests.  They hold for requests
of one size that share nothing and decode all of --new-tokens; SGLang admits more where it expects shorter answers.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vlcache_sgl.capacity import (
    MAX_CELLS,
    POOLS_IN_HOST,
    STATES_PER_REQUEST,
    KVShape,
    Pool,
    StateShape,
    cached_prompts,
    compressed_pool,
    requests_in_flight,
    resident_tokens,
)
from vlcache_sgl.cli.console import table_console
from vlcache_sgl.cli.model_sizes import PlanError, read_model, shape_of, state_shape_of, weight_bytes
from vlcache_sgl.config import ConfigError, KVBudget, KVConfig, config_from

MEM_FRACTION = 0.85
"""Share of the GPU's memory for weights and KV cache; SGLang chooses its own and prints it at start."""
STATE_RATIO = 0.9
"""Memory of a hybrid's states over that of its KV cache; SGLang's default."""
MAX_RUNNING = 2048
"""SGLang's `--max-running-requests` unless given: at least this."""
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_RUNNING = "max-running-requests"
_WIDTH = 110


@dataclass(frozen=True)
class Row:
    """What fits under one budget."""

    budget: str
    """`none` for stock SGLang."""
    physical_tokens: int
    slots: int
    resident_tokens: float
    """What one prompt holds after its prefill, uncompressed tokens."""
    requests: int
    cached_images: int
    room_for: int
    """Requests that memory and slots have room for, whatever `--max-running-requests` is."""
    host_tokens: int
    """Tokens that host memory holds."""
    limited_by: str
    """What keeps a further request from running: memory, slots, states or max-running-requests."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code, 2 when the model or the request cannot be served."""
    arguments = _parser().parse_args(argv)
    console = table_console(_WIDTH)
    try:
        model = read_model(arguments.model)
        shape = shape_of(model, arguments.dtype, arguments.tp, arguments.head_cells, arguments.kv_cache_dtype)
        states = state_shape_of(model, arguments.dtype, arguments.tp)
        stock_tokens, state_slots = _memory(arguments, shape, states)
        rows = plan(arguments, shape, stock_tokens, state_slots)
    except (PlanError, ConfigError) as error:
        Console(stderr=True, soft_wrap=True).print(f"vlcache plan: {error}", style="red", markup=False, highlight=False)
        return 2
    if arguments.json:
        about = {"model": arguments.model, "token_bytes": shape.token_bytes, "tokens_uncompressed": stock_tokens}
        if states is not None:
            about |= {"state_bytes": states.slot_bytes, "state_slots": state_slots}
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        show(rows, arguments, shape, stock_tokens, console)
        if states is not None:
            _show_states(rows, states, state_slots, console)
    return 0


def plan(arguments: argparse.Namespace, shape: KVShape, stock_tokens: int, state_slots: int | None = None) -> list[Row]:
    """Stock SGLang, then every budget.

    Args:
        state_slots: of a hybrid; None: not known, or no hybrid.

    Raises:
        PlanError: when one request alone does not fit.
        ConfigError: for a wrong budget or overcommit.
    """
    prompt, new = arguments.image_tokens + arguments.text_tokens, arguments.new_tokens
    if min(arguments.image_tokens, stock_tokens) < 1 or min(arguments.text_tokens, new) < 0:
        raise PlanError("numbers of tokens must not be negative, and an image has at least one")
    rows = [_row("none", Pool(stock_tokens, stock_tokens), None, arguments, shape, state_slots)]
    for budget in arguments.budget:
        flags = {
            "kv_budget": budget,
            "kv_overcommit": arguments.overcommit,
            "kv_host_memory": arguments.host_memory,
            "kv_recall": arguments.recall,
        }
        config = config_from({"kv_policy": "vlcache", **flags})
        assert isinstance(config, KVConfig)
        host = _host_tokens(config, shape, stock_tokens)
        graphs = arguments.device == "cuda"
        pool = compressed_pool(
            stock_tokens,
            shape,
            config.overcommit_factor,
            graph_lists=graphs,
            host_tokens=host,
            sketches=config.recall > 0,
        )
        if pool.physical_tokens * shape.planes > MAX_CELLS:
            raise PlanError(f"{pool.physical_tokens * shape.planes} cells are more than 32-bit numbers can name")
        # Shorter prompts are left alone.
        compressed = prompt >= config.min_tokens
        kept = config.budget if compressed else None
        rows.append(_row(str(config.budget), pool, kept, arguments, shape, state_slots, host, config.recall))
    for row in rows:
        if row.requests == 0:
            raise PlanError(
                f"one request of {prompt} + {new} tokens does not fit: the KV cache holds {row.physical_tokens} tokens"
                + (f" at budget {row.budget}" if row.budget != "none" else "")
            )
    return rows


def _host_tokens(config: KVConfig, shape: KVShape, stock_tokens: int) -> int:
    """Tokens in host memory; ``auto`` as on a machine that has enough of it."""
    if config.host_memory == "off":
        return 0
    return POOLS_IN_HOST * stock_tokens if config.host_memory == "auto" else config.host_memory // shape.token_bytes


def _row(
    name: str,
    pool: Pool,
    budget: KVBudget | None,
    arguments: argparse.Namespace,
    shape: KVShape,
    state_slots: int | None,
    host_tokens: int = 0,
    recall: int = 0,
) -> Row:
    prompt, new = arguments.image_tokens + arguments.text_tokens, arguments.new_tokens
    resident = resident_tokens(prompt, shape, budget)
    resident += min(recall, prompt - resident)
    limits = {
        "memory": requests_in_flight(Pool(pool.physical_tokens, MAX_CELLS), prompt, resident, new),
        "slots": pool.slots // (prompt + new),
        _RUNNING: arguments.max_running_requests,
    }
    if state_slots is not None:
        limits["states"] = state_slots // STATES_PER_REQUEST
    tightest = min(limits, key=lambda limit: limits[limit])
    # Shared prefixes of compressed prompts lie in host memory, whole; others in the KV cache.
    images = host_tokens // prompt if host_tokens and budget is not None else cached_prompts(pool, prompt, resident)
    if state_slots is not None:
        images = min(images, state_slots)
    return Row(
        name,
        pool.physical_tokens,
        pool.slots,
        round(resident, 1),
        limits[tightest],
        images,
        room_for=min(limits["memory"], limits["slots"]),
        host_tokens=host_tokens,
        limited_by=tightest,
    )


def show(
    rows: Sequence[Row], arguments: argparse.Namespace, shape: KVShape, stock_tokens: int, console: Console
) -> None:
    """For people."""
    per_rank = f" per GPU of {arguments.tp}" if arguments.tp > 1 else ""
    console.print(
        f"KV cache{per_rank}: {in_words(stock_tokens * shape.token_bytes)}, {shape.token_bytes} bytes per token"
    )
    console.print(
        f"requests: {arguments.image_tokens} image + {arguments.text_tokens} text tokens, "
        f"{arguments.new_tokens} decoded"
    )
    table = Table(box=SIMPLE_HEAD)
    table.add_column("budget", no_wrap=True)
    for name in ("memory, tokens", "slots", "per prompt", "requests at once", "limited by", "cached images"):
        table.add_column(name, justify="right", overflow="fold")
    stock = rows[0]
    for row in rows:
        more = "" if row is stock else f" ({row.requests / stock.requests:.1f}x)"
        further = "" if row is stock else f" ({row.cached_images / stock.cached_images:.1f}x)"
        table.add_row(
            "uncompressed" if row is stock else row.budget,
            str(row.physical_tokens),
            str(row.slots),
            f"{row.resident_tokens:g}",
            f"{row.requests}{more}",
            row.limited_by.replace("-", " "),
            f"{row.cached_images}{further}",
        )
    console.print(table)
    if rows[-1].host_tokens:
        tokens = rows[-1].host_tokens
        host = in_words(tokens * shape.token_bytes)
        console.print(f"host memory{per_rank}: {host} for {tokens} tokens of cached images", soft_wrap=True)
    for row in rows[1:]:
        if row.limited_by == _RUNNING:
            console.print(
                f"at budget {row.budget} memory has room for {row.room_for} requests at once "
                f"({row.room_for / stock.room_for:.1f}x): to use it, raise "
                f"--max-running-requests above {arguments.max_running_requests}",
                soft_wrap=True,
            )


def _show_states(rows: Sequence[Row], states: StateShape, slots: int | None, console: Console) -> None:
    """What the layers without a KV cache take, and what to do where they are what is short."""
    console.print(
        f"linear-attention layers: {in_words(states.slot_bytes)} per state"
        + ("" if slots is None else f", {slots} states; a running request has {STATES_PER_REQUEST}, an image one"),
        soft_wrap=True,
    )
    if any(row.limited_by == "states" for row in rows[1:]):
        console.print(
            "states are what is short: a larger --mamba-full-memory-ratio makes more of them, out of the memory that a "
            "compressed KV cache does not need",
            soft_wrap=True,
        )


# -- the model --------------------------------------------------------------------------------------------------------


def _memory(arguments: argparse.Namespace, shape: KVShape, states: StateShape | None) -> tuple[int, int | None]:
    """Uncompressed tokens in the memory that SGLang leaves for the KV cache, and states of a hybrid beside it.

    Raises:
        PlanError: when the weights leave none.
    """
    slots: int | None = None if states is None else arguments.max_mamba_cache_size
    if arguments.max_total_tokens:
        return arguments.max_total_tokens, slots
    static = arguments.gpu_memory * arguments.mem_fraction_static
    weights = (arguments.weights or weight_bytes(arguments.model, arguments.dtype)) / arguments.tp
    memory = static - weights
    if states is not None:
        slots = slots or states.slots_in(memory, arguments.mamba_full_memory_ratio)
        memory -= (slots + 1) * states.slot_bytes
    tokens = int(memory / shape.token_bytes)
    if tokens < 1:
        raise PlanError(
            f"weights of {in_words(weights)} leave no KV cache in {arguments.mem_fraction_static:g} of "
            f"{in_words(arguments.gpu_memory)}; more GPUs: --tp"
        )
    return tokens, slots


# -- the command line -------------------------------------------------------------------------------------------------


def size(text: str) -> int:
    """Bytes of `141GB`, `80GiB`, `500MB`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"expected a size as 141GB or 80GiB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def in_words(count: float) -> str:
    """Bytes for people, in both units that are called so.

    >>> in_words(80 * 2**30)
    '85.9 GB (80 GiB)'
    """
    return f"{count / 10**9:.4g} GB ({count / 2**30:.4g} GiB)"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction between 0 and 1, got {text!r}")
    return share


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return ratio


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlcache plan", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--model", required=True, metavar="CONFIG_OR_FOLDER", help="config.json, its folder, or a name")
    memory = parser.add_mutually_exclusive_group(required=True)
    memory.add_argument("--gpu-memory", type=size, metavar="SIZE", help="of one GPU: 141GB (10^9) or 80GiB (2^30)")
    memory.add_argument(
        "--max-total-tokens", type=_positive, metavar="TOKENS", help="instead: uncompressed tokens, as SGLang's flag"
    )
    parser.add_argument("--budget", nargs="+", default=["0.1"], help="as --kv-budget, several; default: 0.1")
    parser.add_argument("--image-tokens", type=_positive, default=1024, help="per request; default: 1024")
    parser.add_argument("--text-tokens", type=int, default=64, help="template and question; default: 64")
    parser.add_argument("--new-tokens", type=int, default=128, help="decoded per request; default: 128")
    parser.add_argument("--weights", type=size, metavar="SIZE", help="of all GPUs; default: from the model")
    parser.add_argument(
        "--mem-fraction-static", type=_share, default=MEM_FRACTION, help=f"as SGLang's flag; default: {MEM_FRACTION}"
    )
    parser.add_argument("--tp", type=_positive, default=1, help="GPUs of one tensor-parallel server; default: 1")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2"),
        default="auto",
        help="as SGLang's flag: of stored keys and values; default: auto, as --dtype",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="decode graphs cost memory on cuda")
    parser.add_argument("--overcommit", default="auto", help="as --kv-overcommit; default: auto")
    parser.add_argument("--host-memory", default="auto", help="as --kv-host-memory; default: auto, twice the KV cache")
    parser.add_argument("--recall", default="off", help="as --kv-recall; default: off")
    parser.add_argument("--head-cells", action="store_true", help="as --kv-head-cells")
    parser.add_argument(
        "--max-running-requests", type=_positive, default=MAX_RUNNING, help=f"as SGLang's; default: {MAX_RUNNING}"
    )
    parser.add_argument(
        "--mamba-full-memory-ratio",
        type=_ratio,
        default=STATE_RATIO,
        metavar="RATIO",
        help=f"of a hybrid, as SGLang's flag; default: {STATE_RATIO}",
    )
    parser.add_argument(
        "--max-mamba-cache-size", type=_positive, metavar="STATES", help="instead: states, as SGLang's flag"
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
