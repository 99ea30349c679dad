"""Our policies beside those of NVIDIA/kvpress: same checkpoint, prompts and kept shares.

    python -m benchmarks.judge.crosscheck prompts    # writes what `tests/oracles/record_kvpress_smollm2.py` reads
    python -m benchmarks.judge.crosscheck            # compares what that recorded with ours

kvpress keeps a set per KV head, so its twins here do too (``heads=split``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from vlcache_sgl.evaluation.report import markdown_table
from vlcache_sgl.evaluation.stats import bootstrap, mean
from vlcache_sgl.policy import resolve

from ..common.host import ROOT, host_block
from ..common.pages import with_block
from ..common.results import RESULTS, save
from .cases import Asked, CaseId, CaseMaker
from .decisions import Decisions, Kept, Medium, reads_twice
from .page import PAGE
from .records import digest
from .verdicts import Judge, Verdict

MODEL = ROOT / "out/smollm2/text"
PROMPTS = ROOT / "out/judge/prompts.json"
RECORDED = ROOT / "tests/oracles/kvpress_smollm2.json"
RESULT = RESULTS / "judge-crosscheck.json"
ASKED = ("needle:500", "list:250")
SEEDS = range(100, 110)
BARE = ", template evicted"
"""Ends the name of a press whose twin does what kvpress does with the template in front of the text: evict it, but for
the sinks.  Here it is shared by all texts and stays, whatever the policy."""
TWINS = {
    "keydiff": "keydiff:allocator=uniform,heads=split",
    "snapkv": "snapkv:allocator=uniform,window=64,heads=split",
    "expected_attention": "expected_attention:allocator=uniform,rows=0,heads=split",
    "observed_attention": "h2o:allocator=uniform,mean=true,recent=0,heads=split",
    "streaming_llm": "streaming:allocator=uniform,heads=split",
    "tova": "tova:allocator=uniform,heads=split",
    "knorm": "knorm:allocator=uniform,heads=split",
    "compactor": "compactor:allocator=uniform,heads=split",
    "compactor blending 0.35": "compactor:allocator=uniform,heads=split",
    "kvzip": "kvzip:heads=split",
    f"kvzip{BARE}": "kvzip:heads=split",
}
"""A press of kvpress, and the policy that should keep the same; with BARE, also of what stands in front of the text."""


def digest_of(asked: Asked) -> str:
    """Short text that differs when a prompt or its answer does."""
    return hashlib.sha256(json.dumps([asked.prompt, asked.answer]).encode()).hexdigest()[:16]


def write_prompts(model: Path, path: Path) -> None:
    """The prompts as token ids."""
    maker = CaseMaker(model)
    prompts = []
    for seed in SEEDS:
        for task in ASKED:
            name, _, tokens = task.partition(":")
            asked = maker.make(CaseId(name, int(tokens), seed)).first
            ids = {"tokens": asked.prompt, "answer": asked.answer, "text": asked.lines[-1].end}
            prompts.append({"case": [name, int(tokens), seed], "digest": digest_of(asked), **ids})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"weights": digest(model), "prompts": prompts}))


def ours(
    judge: Judge, prompt: Mapping[str, Any], twins: Mapping[str, str], shares: Sequence[float]
) -> dict[str, Verdict]:
    """Verdicts of one prompt by press and share, each keeping as many cells as kvpress.

    Raises:
        ValueError: the recorded prompt is not the one that the case gives today.
    """
    asked = judge.cases.make(CaseId(*prompt["case"])).first
    if digest_of(asked) != prompt["digest"]:
        raise ValueError(f"{prompt['case']} is another prompt by now: record anew")
    hidden, states = judge.network.read(asked.prompt)
    media: tuple[Medium, ...] = ("text", "image")
    made = {
        medium: Decisions(judge.network, asked.prompt, states, asked.lines, medium, judge.cases.instruction)
        for medium in media
    }
    names, kept = [(press, share) for press in twins for share in shares], []
    for press, share in names:
        policy = resolve(twins[press])
        if reads_twice(policy):  # the text without the question
            one = made["image"].keep(policy, share)
            kept.append(without_template(one, asked, policy.selection.sink) if press.endswith(BARE) else one)
        else:
            # kvpress rounds down, and n (1 - (1 - share)) may be just below a whole number.
            length = len(asked.prompt)
            kept.append(made["text"].keep(policy, int(length * (1 - (1 - share))) / length))
    verdicts = judge.first(asked, hidden[-1], states, kept)
    return {f"{press}@{share}": verdict for (press, share), verdict in zip(names, verdicts, strict=True)}


def without_template(kept: Kept, asked: Asked, sinks: int) -> Kept:
    """The same without what stands in front of the text but its first tokens."""
    cells = kept.cells.clone()
    cells[..., sinks : asked.lines[0].begin] = False
    return replace(kept, cells=cells)


def compare(
    recorded: Mapping[str, Any], found: Sequence[Mapping[str, Verdict]], twins: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One row per press and share: right answers and mean log-probability of both, and the difference of the latter."""
    rows = []
    for name in found[0]:
        press, _, share = name.rpartition("@")
        theirs = [prompt["found"][f"{press.removesuffix(BARE)}@{share}"] for prompt in recorded["prompts"]]
        mine = [verdicts[name] for verdicts in found]
        differences = {
            str(number): [ours.log_probability - gained]
            for number, (ours, (_, gained)) in enumerate(zip(mine, theirs, strict=True))
        }
        rows.append(
            {
                "press": press.removesuffix(BARE),
                "policy": twins[press] + (BARE if press.endswith(BARE) else ""),
                "share": float(share),
                "prompts": len(mine),
                "right": [sum(int(right) for right, _ in theirs), sum(verdict.right for verdict in mine)],
                "log_probability": [
                    round(sum(gained for _, gained in theirs) / len(theirs), 3),
                    round(sum(verdict.log_probability for verdict in mine) / len(mine), 3),
                ],
                "difference": round(mean(differences), 4),
                "interval": [round(end, 4) for end in bootstrap(differences)],
                "largest": round(max(abs(value) for (value,) in differences.values()), 4),
            }
        )
    return rows


def committed() -> dict[str, Any] | None:
    """The result, if there is one."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else None


def rendered(page: str, result: Mapping[str, Any] | None) -> str:
    """`page` with the table made anew."""
    block = "Not measured yet."
    if result is not None:
        where = f"kvpress {result['kvpress']['kvpress']}, {result['host']['date'][:10]}, float32"
        count = f"{result['summary'][0]['prompts']} prompts of {' and '.join(f'`{task}`' for task in ASKED)}"
        block = f"{table(result['summary'])}\n\n`{result['command']}`, {where}, {count}."
    return with_block(page, "judge-crosscheck", block)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Theirs and ours beside each other."""
    lines = [
        [
            f"`{row['press']}`",
            f"`{row['policy']}`",
            f"{row['share']:g}",
            "{} / {}".format(*row["right"]),
            "{:.2f} / {:.2f}".format(*row["log_probability"]),
            "{:.3f} ({:.3f} to {:.3f})".format(row["difference"], *row["interval"]),
        ]
        for row in rows
    ]
    head = ("kvpress", "ours", "kept", "right, theirs / ours", "log-probability, theirs / ours", "difference")
    return markdown_table(head, lines, left=2)


def main() -> int:
    """Write the prompts, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=("prompts", "compare"), default="compare")
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder")
    parser.add_argument("--twins", nargs="+", metavar="PRESS=POLICY", help="other policies to compare; writes nothing")
    arguments = parser.parse_args()
    console = Console(width=160)
    if arguments.step == "prompts":
        write_prompts(arguments.model, PROMPTS)
        console.print(f"written: {PROMPTS}", soft_wrap=True)
        return 0
    recorded = json.loads(RECORDED.read_text())
    if digest(arguments.model) != recorded["weights"]:
        console.print(f"{arguments.model} is not the model that {RECORDED.name} was recorded with", style="red")
        return 2
    torch.set_num_threads(1)
    twins = dict(item.split("=", 1) for item in arguments.twins) if arguments.twins else TWINS
    started, judge = host_block(), Judge(arguments.model)
    prompts = track(recorded["prompts"], "prompts", console=console)
    rows = compare(recorded, [ours(judge, prompt, twins, recorded["shares"]) for prompt in prompts], twins)
    console.print(table(rows), soft_wrap=True, markup=False)
    if not arguments.twins:
        head = {
            "task": "crosscheck",
            "command": "python -m benchmarks.judge.crosscheck",
            "host": started,
            "kvpress": recorded["versions"],
        }
        result = {**head, "summary": rows}
        written = save(RESULT, result)
        PAGE.write_text(rendered(PAGE.read_text(), result))
        console.print(f"written: {written} and {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
