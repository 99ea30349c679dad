"""`vlcache demo`: ask a real server about images, compressed and in full, and show what each answer cost.

Two servers run one after the other on the same questions, the first with the policy at a small budget, the second at
budget 1.0.  The exit code is 0 when the compressed answers to the first question about each image are those of the
full cache (19 of 20 suffice).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from vlcache_sgl.cli.console import table_console
from vlcache_sgl.client.bundled import bundled_model
from vlcache_sgl.client.client import Client
from vlcache_sgl.client.server import BUNDLED_FLAGS, ServerError, ServerProcess, interruptible
from vlcache_sgl.evaluation.tasks.receipts import make_receipt

GRIDS = ((24, 24), (24, 28), (28, 28), (28, 32), (32, 32))
"""Rows and columns of the images, 576 to 1024 image tokens."""
NUM_IMAGES = 20
FOLLOWED = (0, 4)
"""Images that get follow-up questions: the smallest and the largest."""
NUM_FOLLOW_UPS = 3
FIRST_SEED = 30000
MATCHING_SHARE = 0.95
"""Least share of first questions that compression must not change."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 150
"""Columns of the table where the output is no terminal."""


@dataclass(frozen=True)
class Task:
    """A question about an image."""

    label: str
    image: Image.Image
    question: str
    expected: str | None
    """None for a user's own image."""
    follow_up: bool = False


@dataclass(frozen=True)
class Row:
    """A task, its answer, and what the server counted meanwhile."""

    task: Task
    answer: str
    prompt_tokens: int
    cached_tokens: int
    kept_by_layer: tuple[int, ...]
    """Tokens of the prompt that this request itself holds in each layer; a shared prefix is held by its first user."""
    bytes_per_cell: int

    @property
    def right(self) -> bool:
        return self.answer == self.task.expected

    @property
    def bytes_full(self) -> int:
        """Bytes of the prompt's KV without compression and sharing."""
        return self.prompt_tokens * len(self.kept_by_layer) * self.bytes_per_cell

    @property
    def bytes_kept(self) -> int:
        return sum(self.kept_by_layer) * self.bytes_per_cell


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    arguments = _parser().parse_args(argv)
    console = table_console(_WIDTH)
    model = Path(arguments.model) if arguments.model else bundled_model()
    if not (model / "config.json").exists():
        console.print(f"vlcache demo: no model at {model}; name one with --model PATH", style="red")
        return 2
    try:
        tasks = [_own_task(arguments.image, arguments.question)] if arguments.image else receipt_tasks()
    except (OSError, UnidentifiedImageError) as error:
        console.print(f"vlcache demo: {error}", style="red")
        return 2
    try:
        with interruptible():
            compressed = run(model, arguments.policy, arguments.budget, tasks, console)
            full = run(model, arguments.policy, "1.0", tasks, console)
    except ServerError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the server is stopped")
        return 130
    return summarise(compressed, full, arguments.budget, console)


def receipt_tasks() -> list[Task]:
    """The first question about every image, then the follow-ups."""
    first, later = [], []
    for number in range(NUM_IMAGES):
        rows, cols = GRIDS[number % len(GRIDS)]
        receipt = make_receipt(FIRST_SEED + number, rows, cols, num_questions=1 + NUM_FOLLOW_UPS)
        label = f"{number + 1}: {rows}x{cols}"
        question, *others = receipt.questions
        first.append(Task(label, receipt.image, question.text, question.answer))
        if number in FOLLOWED:
            later += [Task(label, receipt.image, other.text, other.answer, follow_up=True) for other in others]
    return first + later


def run(model: Path, policy: str, budget: str, tasks: Sequence[Task], console: Console) -> list[Row]:
    """Serve the model at one budget, ask everything, print the table, stop the server."""
    flags = ["--kv-policy", policy, "--kv-budget", budget]
    console.print(f"\n[bold]$ sglang serve --model-path {model} {' '.join(flags)}[/bold]", highlight=False)
    with ServerProcess(model, [*BUNDLED_FLAGS, *flags], title=f"budget {budget}", console=console) as server:
        client = Client(server.openai_url)
        rows = [
            ask(server, client, task)
            for task in track(tasks, f"budget {budget}: asking", console=console, transient=True)
        ]
    console.print(table_of(rows, f"{policy}, budget {budget}"))
    return rows


def ask(server: ServerProcess, client: Client, task: Task) -> Row:
    """One question; what it kept is the difference of the server's running totals."""
    before = server.kv_policy()
    answer = client.ask(task.question, task.image, max_tokens=16)
    after = server.kv_policy()
    layers = int(after["cells_per_token"])
    seen, kept = (_difference(before, after, key, layers) for key in ("seen_by_layer", "kept_by_layer"))
    # What was not offered to the policy (too short, or budget 1.0) is held in full.
    assert answer.cached_tokens is not None  # the demo's servers run with --enable-cache-report
    assert answer.new_tokens is not None
    held = tuple(k + answer.new_tokens - s for s, k in zip(seen, kept, strict=True))
    return Row(
        task, answer.text.strip(), answer.prompt_tokens, answer.cached_tokens, held, int(after["bytes_per_cell"])
    )


def table_of(rows: Sequence[Row], title: str) -> Table:
    """Questions and answers, with the memory of each."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = "KV kept: what the request itself holds; follow-up questions share the image with the first."
    table.add_column("image", no_wrap=True)
    table.add_column("question")
    for name in ("answer", "expected"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt", "cached"):
        table.add_column(name, justify="right")
    table.add_column("kept per layer", no_wrap=True)
    for name in ("KV full", "KV kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        colour = "" if row.task.expected is None else "[green]" if row.right else "[red]"
        share = row.bytes_kept / max(1, row.bytes_full)
        table.add_row(
            row.task.label + (" again" if row.task.follow_up else ""),
            escape(row.task.question),
            f"{colour}{escape(row.answer[:40])}",
            row.task.expected or "",
            str(row.prompt_tokens),
            str(row.cached_tokens),
            f"{bar([kept / row.prompt_tokens for kept in row.kept_by_layer])} {share:4.0%}",
            decimal(row.bytes_full),
            decimal(row.bytes_kept),
            end_section=i + 1 < len(rows) and rows[i + 1].task.follow_up != row.task.follow_up,
        )
    return table


def bar(shares: Sequence[float]) -> str:
    """One block per layer, as high as the share that is kept.

    >>> bar([0.0, 0.1, 0.5, 1.0])
    '▁▁▄█'
    """
    return "".join(_BLOCKS[min(len(_BLOCKS), max(1, round(share * len(_BLOCKS)))) - 1] for share in shares)


def summarise(compressed: Sequence[Row], full: Sequence[Row], budget: str, console: Console) -> int:
    """Say how both runs compare; returns the exit code."""
    pairs = list(zip(compressed, full, strict=True))
    first = [(ours, whole) for ours, whole in pairs if not ours.task.follow_up]
    later = [(ours, whole) for ours, whole in pairs if ours.task.follow_up]
    kept, whole_bytes = sum(ours.bytes_kept for ours, _ in first), sum(ours.bytes_full for ours, _ in first)
    same = sum(ours.answer == whole.answer for ours, whole in first)
    needed = MATCHING_SHARE * len(first)
    console.print()
    console.print(
        f"KV of {len(first)} prompts: {decimal(whole_bytes)} in full, {decimal(kept)} at budget {budget} "
        f"({kept / max(1, whole_bytes):.1%})"
    )
    console.print(f"First questions: {same} of {len(first)} answers are those of the full cache", _right(first))
    if later:
        console.print(f"Follow-up questions: {len(later)} on images that were asked about before", _right(later))
        shared = sum(ours.cached_tokens for ours, _ in later) / sum(ours.prompt_tokens for ours, _ in later)
        most = max(ours.bytes_kept for ours, _ in later)
        # Cells that the tree gives up for a question may be more than what the question keeps.
        added = f"more than {decimal(most)}" if most > 0 else "memory"
        console.print(f"  {shared:.1%} of their tokens came from the cache; none added {added}")
    if first[0][0].task.expected is None:
        return 0
    passed = same >= needed
    console.print(
        f"[green]passed[/green]: at least {needed:.0f} had to match"
        if passed
        else f"[red]failed[/red]: at least {needed:.0f} have to match"
    )
    return 0 if passed else 1


def _right(pairs: Sequence[tuple[Row, Row]]) -> str:
    if pairs[0][0].task.expected is None:
        return ""
    ours, whole = (sum(row.right for row in rows) for rows in zip(*pairs, strict=True))
    return f"({ours} right; {whole} right with the full cache)"


def _difference(before: dict[str, Any], after: dict[str, Any], key: str, layers: int) -> tuple[int, ...]:
    """Per layer; the lists are empty until something has been compressed."""
    nothing = [0] * layers
    return tuple(b - a for a, b in zip(before[key] or nothing, after[key] or nothing, strict=True))


def _own_task(path: str, question: str) -> Task:
    with Image.open(path) as image:
        return Task(Path(path).name, image.convert("RGB"), question, expected=None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlcache demo", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--model", metavar="PATH", help="a vision-language model; default: the bundled one")
    parser.add_argument("--policy", default="vlcache", help="value of --kv-policy; default: vlcache")
    parser.add_argument("--budget", default="0.1", help="value of --kv-budget of the compressed run; default: 0.1")
    parser.add_argument("--image", metavar="PATH", help="ask about this image instead of the built-in ones")
    parser.add_argument("--question", default="What is in this image?", help="what to ask about --image")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
