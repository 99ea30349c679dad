"""Whole servers on a CUDA device: the same kernels at budget 1.0 and 0.1, and stock SGLang.

    python -m benchmarks.gpu.e2e [--points 32768x4] [--attention-backend triton]

The model has the sizes of Qwen2.5-VL-7B and dummy weights, so nothing is downloaded; its attention is close to
uniform, which makes VL-Cache's layer budgets nearly equal.  A point is a prompt length and a batch; every request asks
for 100 tokens.  Each server has the whole device to itself, one after the other.

* **decode tokens/s**: while the whole batch decodes; empty where the pool does not hold the batch at once.  Timed on
  the request that gets its first token last.  Servers stream the first token and the last ones only: 64 streams of
  single tokens would time the client.
* **end to end**: from sending to the last token of the last request, waiting for memory included.

Servers run one after the other, or, with ``--together TOKENS``, side by side with a pool of so many tokens each: then
repeats take turns, which is kinder to a device that is there for minutes.

``--smoke`` runs the same program on a CPU with a tiny model; its times mean nothing.  Exit status: 0 when every check
of the answers and of the servers' books holds, 1 when one does not, 2 when there is nothing to run on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 0.1
CONTENDERS: dict[str, tuple[str, ...]] = {
    "stock": (),
    "stock as it is": (),
    "ours 1.0": ("--kv-policy", "vlcache", "--kv-budget", "1.0"),
    "ours 0.1": ("--kv-policy", "vlcache", "--kv-budget", str(BUDGET)),
}
AS_IT_IS = "stock as it is"
"""SGLang with the attention that it chooses for the machine itself, on Hopper FlashAttention 3."""
RATIOS = (("ours 0.1", "ours 1.0"), ("ours 1.0", "stock"), ("ours 0.1", "stock"), ("ours 0.1", AS_IT_IS))
"""What is divided by what; the first three pairs run the same kernels of attention."""
HEADER_TOKENS = 16
READY_S = 1200.0
"""A first start compiles kernels."""


@dataclass(frozen=True)
class Setting:
    """What one run measures, on a GPU or in the smoke test."""

    points: tuple[tuple[int, int], ...]
    """Prompt tokens and batch, batch 1 of a length before larger ones."""
    tokens: int
    """To generate."""
    repeats: int
    flags: tuple[str, ...]
    attention: tuple[str, ...]
    """Flags that choose the kernels of attention, for all servers but `AS_IT_IS`."""
    text: dict[str, Any]
    """Sizes of the language model."""
    dtype: str
    name: str


def settings(smoke: bool, backend: str | None) -> Setting:
    from benchmarks.models.make_model import QWEN_7B, TEXT

    if smoke:
        # More ids than the tokenizer knows, as in the large model.
        text = TEXT | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "vocab_size": 1024}
        flags: tuple[str, ...] = ("--dtype", "float32", "--max-total-tokens", "8192", "--chunked-prefill-size", "256")
        return Setting(((1200, 1), (1200, 3)), 12, 1, flags, (), text, "float32", "smoke-3x512-dummy")
    points = tuple((tokens, batch) for tokens in (2048, 32768, 131072) for batch in (1, 4, 64))
    backend = backend or ("flashinfer" if importlib.util.find_spec("flashinfer") else "triton")
    attention = ("--attention-backend", backend)
    return Setting(points, 100, 3, ("--dtype", "bfloat16"), attention, QWEN_7B, "bfloat16", "qwen2.5-vl-7b-dummy")


def unfit(smoke: bool) -> str | None:
    """Why this machine cannot run the benchmark, in a line; None if it can."""
    missing = [name for name in ("torch", "sglang", "vlcache_sgl", "httpx") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {' and no '.join(missing)}; choose another with make gpu-e2e GPU_PYTHON=..."
    import torch

    if not smoke and not torch.cuda.is_available():
        return (
            "no CUDA device: torch.cuda.is_available() is false; nothing was measured "
            "(--smoke runs the program on a CPU, without a result)"
        )
    return None


# -- one server --------------------------------------------------------------------------------------------------------


def measure(server: Any, point: tuple[int, int], tokens: int, repeat: int) -> dict[str, Any]:
    """One sample: the batch at one moment, on prompts that this server has not seen."""
    from benchmarks.common.load import make_long_prompt, prefill_ms, send_together

    length, batch = point
    server.flush_cache()
    before = server.kv_policy()
    lines = send_together(
        server.url, [make_long_prompt(length, seed=1 + 1000 * repeat + i) for i in range(batch)], tokens
    )
    after = server.kv_policy()
    end_to_end = max(line.arrivals[-1][0] for line in lines) - min(line.sent for line in lines)
    counts = {
        key: float(after[key]) - float(before[key])
        for key in ("requests_compressed", "policy_failures", "cells_seen", "cells_kept")
        if key in after
    }
    return {
        "tokens": length,
        "batch": batch,
        "repeat": repeat,
        "prompt_tokens": [int(line.meta["prompt_tokens"]) for line in lines],
        "cached_tokens": [int(line.meta["cached_tokens"]) for line in lines],
        "completion_tokens": [int(line.meta["completion_tokens"]) for line in lines],
        "retractions": sum(int(line.meta.get("num_retractions") or 0) for line in lines),
        "ttft_ms": [round(line.ttft_ms, 1) for line in lines],
        "prefill_ms": round(prefill_ms(lines), 1),
        "decode_tokens_per_s": decode_speed(lines),
        "end_to_end_ms": round(end_to_end * 1e3, 1),
        "books": counts,
        "integrity": after.get("integrity", []),
    }


def decode_speed(lines: Sequence[Any]) -> float | None:
    """Tokens of the whole batch per second; None where its requests did not all decode at once.

    From the moment when the last request has its first token, all decode in step until one has its last.
    """
    last = max(lines, key=lambda line: line.arrivals[0][0])
    (begin, had), (end, has) = last.arrivals[0], last.arrivals[-1]
    if has <= had or min(line.arrivals[-1][0] for line in lines) <= begin:
        return None
    speed: float = len(lines) * (has - had) / (end - begin)
    return round(speed, 2)


def sample_problems(name: str, sample: dict[str, Any], tokens: int) -> list[str]:
    """What is wrong with a sample: a figure of a server that did something else is worse than none."""
    where = f"{name}, {sample['tokens']} x {sample['batch']}, repeat {sample['repeat']}"
    books = sample["books"]
    problems = []

    def expect(holds: bool, what: str) -> None:
        if not holds:
            problems.append(f"{where}: {what}")

    expect(sample["completion_tokens"] == [tokens] * sample["batch"], f"generated {sample['completion_tokens']}")
    # The chat template's header is the same everywhere, and the first word may be, too.
    hits = max(sample["cached_tokens"])
    expect(hits <= HEADER_TOKENS, f"a prefix hit of {hits} tokens on prompts that are all new")
    low, high = min(sample["prompt_tokens"]), max(sample["prompt_tokens"])
    expect(0.9 * sample["tokens"] <= low <= high <= 1.1 * sample["tokens"] + 64, f"prompts of {low} to {high} tokens")
    expect(not sample["integrity"], f"the books do not balance: {sample['integrity']}")
    expect(bool(books) == (not name.startswith("stock")), "a policy is on where it should not be, or off")
    if books:
        expect(books["policy_failures"] == 0, "a policy failed")
        # A retracted prompt is compressed twice.
        wanted = sample["batch"] if name == "ours 0.1" else 0
        compressed = books["requests_compressed"]
        expect(wanted <= compressed <= wanted + sample["retractions"], f"{compressed:g} requests were compressed")
        if wanted and books["cells_seen"]:
            kept = books["cells_kept"] / books["cells_seen"]
            expect(abs(kept - BUDGET) < 0.05 * BUDGET, f"{kept:.4f} of the cells were kept")
    return problems


class Record:
    """What was measured, written after every sample: a run that is cut off leaves what it has."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self._head = path, head
        self.samples: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.servers: dict[str, dict[str, Any]] = {}
        """What each says of itself."""

    def write(self) -> None:
        rest = {"summary": summarise(self.samples), "samples": self.samples}
        result = {**self._head, "servers": self.servers, "problems": self.problems, **rest}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(result, indent=1) + "\n")


@dataclass(frozen=True)
class Job:
    """What is measured, whichever way servers take turns."""

    names: Sequence[str]
    """Contenders."""
    setting: Setting
    points: Sequence[tuple[int, int]]
    model: Path
    limit_s: float
    """Samples that would take longer are left out."""
    console: Any
    record: Record


class Contender:
    """A server that runs and is measured."""

    def __init__(self, name: str, server: Any, job: Job) -> None:
        from benchmarks.common.load import make_long_prompt, send_together

        self.name, self._server, self._setting = name, server, job.setting
        self._limit_s, self._console, self._record = job.limit_s, job.console, job.record
        self._one_s: dict[int, float] = {}
        # The first request of a process pays for lazy imports, compilation and first allocations.
        send_together(server.url, [make_long_prompt(400, seed=999_000 + i) for i in range(2)], 4)

    def measure(self, point: tuple[int, int], repeat: int) -> None:
        """One sample of a point, or why there is none."""
        length, batch = point
        if (expected := self._one_s.get(length, 0.0) * batch) > self._limit_s:
            if not repeat:
                skipped = f"would take {expected / 60:.0f} minutes"
                self._record.samples.append({"server": self.name, "tokens": length, "batch": batch, "skipped": skipped})
            return
        sample = measure(self._server, point, self._setting.tokens, repeat)
        self._record.samples.append({"server": self.name, **sample})
        self._record.problems += sample_problems(self.name, sample, self._setting.tokens)
        self._record.write()
        self._one_s.setdefault(length, sample["end_to_end_ms"] / 1e3 / batch)
        self._console.print(
            f"{self.name}: {length} x {batch}: {sample['end_to_end_ms']:.0f} ms end to end, "
            f"{sample['decode_tokens_per_s'] or float('nan'):.1f} tokens/s in decode"
        )

    def about(self) -> None:
        """Write down what the server says of itself."""
        info = self._server.server_info()
        keys = ("attention_backend", "max_total_num_tokens", "kv_cache_dtype", "dtype")
        self._record.servers[self.name] = {key: info.get(key) for key in keys}


def make_server(name: str, job: Job, pool: int | None) -> Any:
    """One of the contenders, not yet started; its pool has `pool` tokens, None: what fits the device."""
    from vlcache_sgl.client.server import ServerProcess

    flags = [
        *job.setting.flags,
        *(() if name == AS_IT_IS else job.setting.attention),
        "--load-format",
        "dummy",
        "--stream-interval",
        "1",
        "--skip-server-warmup",
        "--enable-metrics",
    ]
    if pool is not None:
        flags += ["--max-total-tokens", str(pool), "--mem-fraction-static", "0.95"]
    flags += ["--max-running-requests", str(max(batch for _, batch in job.points)), *CONTENDERS[name]]
    return ServerProcess(job.model, flags, title=name, console=job.console, timeout_s=READY_S)


def run_in_turn(job: Job) -> None:
    """Each server with the device to itself."""
    for name in job.names:
        with make_server(name, job, None) as server:
            contender = Contender(name, server, job)
            contender.about()
            for point in job.points:
                for repeat in range(job.setting.repeats):
                    contender.measure(point, repeat)


def run_together(job: Job, pool: int) -> None:
    """All servers on the device at once; only one is asked at a time, in another order in every repeat."""
    with ExitStack() as stack:
        processes = {name: make_server(name, job, pool) for name in job.names}
        for process in processes.values():
            stack.callback(process.stop)
            process.launch()
        for process in processes.values():
            process.wait_until_ready()
        contenders = [Contender(name, process, job) for name, process in processes.items()]
        for contender in contenders:
            contender.about()
        for repeat in range(job.setting.repeats):
            turn = repeat % len(contenders)
            for point in job.points:
                for contender in [*contenders[turn:], *contenders[:turn]]:
                    contender.measure(point, repeat)


# -- all of them -------------------------------------------------------------------------------------------------------


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians by point and server, then their ratios: decode speed and end-to-end speed, above 1 is faster."""
    rows: list[dict[str, Any]] = []
    for point in dict.fromkeys((s["tokens"], s["batch"]) for s in samples):
        row: dict[str, Any] = {"tokens": point[0], "batch": point[1], "median": {}, "speedup": {}}
        for name in CONTENDERS:
            mine = [s for s in samples if s["server"] == name and (s["tokens"], s["batch"]) == point]
            measured = [s for s in mine if "skipped" not in s]
            if not measured:
                continue
            speeds = [s["decode_tokens_per_s"] for s in measured]
            row["median"][name] = {
                "decode_tokens_per_s": None if None in speeds else statistics.median(speeds),
                "end_to_end_ms": statistics.median(s["end_to_end_ms"] for s in measured),
            }
        for fast, slow in RATIOS:
            a, b = row["median"].get(fast), row["median"].get(slow)
            if a is None or b is None:
                continue
            together = a["decode_tokens_per_s"] and b["decode_tokens_per_s"]
            row["speedup"][f"{fast} / {slow}"] = {
                "decode": round(a["decode_tokens_per_s"] / b["decode_tokens_per_s"], 3) if together else None,
                "end_to_end": round(b["end_to_end_ms"] / a["end_to_end_ms"], 3),
            }
        rows.append(row)
    return rows


def table_of(rows: Sequence[dict[str, Any]]) -> Any:
    """Speed-ups, decode and end to end."""
    from rich.table import Table

    table = Table(title="Speed-up, decode | end to end", title_justify="left")
    table.add_column("prompt x batch", no_wrap=True)
    names = [f"{fast} / {slow}" for fast, slow in RATIOS]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = []
        for name in names:
            found = row["speedup"].get(name)
            decode = "not at once" if found and found["decode"] is None else f"{found['decode']:.2f}" if found else ""
            cells.append(f"{decode} | {found['end_to_end']:.2f}" if found else "not measured")
        table.add_row(f"{row['tokens']} x {row['batch']}", *cells)
    return table


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", metavar="TOKENSxBATCH", help="for instance 32768x4; default: nine")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), metavar="SERVER", help="some of the four")
    parser.add_argument("--repeats", type=int, help="samples of each server and point; default 3")
    parser.add_argument("--attention-backend", choices=("flashinfer", "triton"), help="default: flashinfer if there")
    parser.add_argument("--server-flags", default="", metavar="FLAGS", help="further flags of all servers, in quotes")
    parser.add_argument("--together", type=int, metavar="TOKENS", help="servers side by side, pools of so many tokens")
    parser.add_argument("--limit-minutes", type=float, default=10.0, help="leave out samples that would take longer")
    parser.add_argument("--out", type=Path, help="JSON file; default: in benchmarks/results, with --smoke in out")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a CPU: does the program run?")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if problem := unfit(args.smoke):
        print(f"gpu_e2e: {problem}", file=sys.stderr)
        return 2
    from dataclasses import replace

    from rich.console import Console

    from benchmarks.common.host import command_line, device_name, host_block
    from benchmarks.models.make_model import make_config
    from vlcache_sgl.client.server import interruptible

    console = Console() if sys.stdout.isatty() else Console(width=140)
    setting = settings(args.smoke, args.attention_backend)
    flags = (*setting.flags, *shlex.split(args.server_flags))
    setting = replace(setting, repeats=args.repeats or setting.repeats, flags=flags)
    points = setting.points
    if args.points:
        points = tuple(sorted((int(a), int(b)) for a, b in (text.split("x") for text in args.points)))
    model = make_config(ROOT / "out" / setting.name, setting.text, setting.dtype)
    host = host_block()
    name = f"gpu-e2e-{device_name()}-{setting.name}.json"
    head = {
        "task": "gpu-e2e",
        "smoke": args.smoke,
        "command": command_line(),
        "host": host,
        "model": {"name": setting.name, "made_by": "benchmarks/models/make_model.py", "sizes": setting.text},
        "server_flags": [*setting.flags, *setting.attention],
        "together": args.together,
        "generated_tokens": setting.tokens,
    }
    record = Record(args.out or ROOT / ("out" if args.smoke else "benchmarks/results") / name, head)
    names = args.only or list(CONTENDERS)
    job = Job(names, setting, points, model, args.limit_minutes * 60, console, record)
    with interruptible():
        run_in_turn(job) if args.together is None else run_together(job, args.together)
    backends = {about["attention_backend"] for name, about in record.servers.items() if name != AS_IT_IS}
    if len(backends) > 1:
        record.problems.append(f"servers used different kernels: {record.servers}")
    record.write()
    console.print(table_of(summarise(record.samples)))
    for line in record.problems:
        console.print(f"WRONG {line}")
    if args.smoke:
        console.print("SMOKE TEST on a CPU with a tiny model: the times above are not results")
    console.print(f"written: {record.path}")
    return 1 if record.problems else 0


if __name__ == "__main__":
    sys.exit(main())
