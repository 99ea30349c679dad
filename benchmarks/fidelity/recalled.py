"""Right answers with recall on a real server, by how many evicted tokens come back per layer and step.

Both bundled models, a policy that looks at the question and one that does not, a tenth of the cache.

`grounded` looks ahead in its prefill, `ungrounded` while it answers.  Several questions about each image share it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.host import ROOT, command_line, host_block
from benchmarks.common.pages import with_block
from benchmarks.common.results import folder, save
from vlcache_sgl.client.client import Client
from vlcache_sgl.client.server import ServerProcess, interruptible
from vlcache_sgl.evaluation.stats import wilson
from vlcache_sgl.evaluation.tasks.receipts import make_receipt

PAGE = ROOT / "docs/recall.md"
MARKERS = "recall-server"
MODELS = ("models/tinyvlm/grounded", "models/tinyvlm/ungrounded")
POLICIES = ("vlcache", "keydiff")
BUDGET = 0.1
TOKENS = (0, 8, 24, 64)
FIRST_SEED = 220_000
SIDE, QUESTIONS, ANSWER_TOKENS = 24, 4, 8
FLAGS = (
    *("--kv-policy", "vlcache", "--kv-budget", str(BUDGET), "--kv-host-memory", "256MB", "--kv-recall", "64"),
    *("--dtype", "float32", "--max-total-tokens", "8192", "--skip-server-warmup", "--sleep-on-idle"),
)
FULL: dict[str, Any] = {"kv_budget": 1.0}


def arms() -> dict[str, dict[str, Any]]:
    """What is asked for, by name."""
    found = {"full cache": FULL}
    for policy in POLICIES:
        for tokens in TOKENS:
            found[f"{policy}, {tokens}"] = {"kv_policy": policy, "kv_recall": tokens}
    return found


def measure(model: str, images: int, console: Console) -> list[dict[str, Any]]:
    """One record per question and arm."""
    records = []
    with ServerProcess(ROOT / model, FLAGS, title=Path(model).name, console=console) as server:
        client = Client(server.openai_url)
        for number in range(images):
            drawn = make_receipt(FIRST_SEED + number, SIDE, SIDE, num_questions=QUESTIONS)
            for place, question in enumerate(drawn.questions):
                for name, params in arms().items():
                    answer = client.ask(
                        question.text,
                        drawn.image,
                        max_tokens=ANSWER_TOKENS,
                        return_meta_info=True,
                        custom_params=params,
                    )
                    records.append(
                        {
                            "model": Path(model).name,
                            "image": number,
                            "question": place,
                            "arm": name,
                            "text": answer.text,
                            "right": answer.text.strip() == question.answer,
                            "recall": answer.report.get("recall"),
                        }
                    )
            if number % 5 == 4:
                console.print(f"{model}: {number + 1} of {images} images")
        state = server.kv_policy()
        assert state["integrity"] == [], state["integrity"]
    return records


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per model and arm: right answers, answers that are the full cache's, and what came from the host."""
    rows = []
    for model in dict.fromkeys(record["model"] for record in records):
        mine = [record for record in records if record["model"] == model]
        full = {(r["image"], r["question"]): r["text"] for r in mine if r["arm"] == "full cache"}
        for arm in dict.fromkeys(record["arm"] for record in mine):
            of_arm = [record for record in mine if record["arm"] == arm]
            reports = [record["recall"] for record in of_arm if record["recall"]]
            rows.append(
                {
                    "model": model,
                    "arm": arm,
                    "questions": len(of_arm),
                    "right": sum(record["right"] for record in of_arm),
                    "as_full": sum(record["text"] == full[record["image"], record["question"]] for record in of_arm),
                    "from_host": round(sum(r["from_host"] for r in reports) / len(reports), 3) if reports else None,
                }
            )
    return rows


def block(result: dict[str, Any]) -> str:
    """The table of docs/recall.md."""
    rows = {(row["model"], row["arm"]): row for row in result["summary"]}
    models = list(dict.fromkeys(row["model"] for row in result["summary"]))
    lines = [
        "| policy, tokens that come back | "
        + " | ".join(f"{model}: right | as full | from the host" for model in models)
        + " |",
        "|---|" + "---:|" * (3 * len(models)),
    ]
    for arm in dict.fromkeys(row["arm"] for row in result["summary"]):
        cells = []
        for model in models:
            row = rows[model, arm]
            low, high = wilson(row["right"], row["questions"])
            cells.append(f"{row['right'] / row['questions']:.2f} ({low:.2f} to {high:.2f})")
            cells.append(f"{row['as_full'] / row['questions']:.2f}")
            cells.append("" if row["from_host"] is None else f"{row['from_host']:.2f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    questions = result["summary"][0]["questions"]
    lines += [
        "",
        f"`{result['command']}`, {questions} questions, {result['host']['date'][:10]}, {result['host']['device']}.",
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `run.py recalled`."""
    parser.add_argument("--images", type=int, default=25)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/; elsewhere no page is written")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Ask, write the file and the table."""
    with interruptible():
        records = [record for model in MODELS for record in measure(model, arguments.images, console)]
    result = {
        "task": "recalled",
        "command": command_line(),
        "host": host_block(),
        "server_flags": list(FLAGS),
        "budget": BUDGET,
        "summary": summarise(records),
        "records": records,
    }
    console.print("written:", save(folder(arguments.output, whole=True) / "recall-tinyvlm.json", result))
    console.print(block(result))
    if arguments.output is None:
        PAGE.write_text(with_block(PAGE.read_text(), MARKERS, block(result)))
    return 0
