"""Measure a checkpoint with transformers: `python -m models.tinyvlm.evaluate grounded` from the root of the repository.

Held-out images: exact match at full cache by grid, then answers from compressed caches, cache hit rates, densities.
The results file names the command; the model card's tables are generated from it (`python -m models.tinyvlm.card`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from vlcache_sgl.evaluation.tasks.receipts import make_receipt

from . import caches, checkpoint
from .probe import Probe

FULL_GRIDS = ("16x16", "12x20", "10x11", "24x24", "20x32", "32x32")
COMPRESSED_GRIDS = ("24x24", "32x32")
BUDGETS = (0.05, 0.1, 0.2)
HIT_BUDGET = 0.1
"""The paper's figure 3."""
FIRST_SEED = 1000
"""Held-out images are numbered from here."""
QUESTIONS_PER_IMAGE = 4

Json = dict[str, Any]


def exact_match(probe: Probe, grid: str, receipts: int, first_seed: int = FIRST_SEED) -> Json:
    """Right answers at full cache, with the 95 % interval of their share."""
    answers = []
    for seed in range(first_seed, first_seed + receipts):
        receipt = make_receipt(seed, *shape(grid), num_questions=QUESTIONS_PER_IMAGE)
        answers += [probe.right(receipt, question) for question in receipt.questions]
    return {"grid": grid, **share(answers)}


def compressed(probe: Probe, grid: str, receipts: int, first_seed: int = FIRST_SEED) -> Json:
    """Answers that equal the full cache's, per policy and budget; hit rates and densities on the same questions."""
    generator = torch.Generator().manual_seed(first_seed)
    same: dict[tuple[str, bool, float], list[bool]] = {}
    record, text, full, tokens = [], [], [], []
    hits: dict[str, list[caches.HitRate]] = {name: [] for name in caches.SCORERS}
    densities: list[list[float]] = []
    for seed in range(first_seed, first_seed + receipts):
        receipt = make_receipt(seed, *shape(grid), num_questions=QUESTIONS_PER_IMAGE)
        for question in receipt.questions:
            prompt = probe.prefill(receipt, question)
            full.append(prompt.right)
            tokens.append(prompt.tokens)
            densities.append([layer.density for layer in prompt.layers])
            for name, measured in hits.items():
                measured.append(caches.hit_rate(prompt, name, HIT_BUDGET, generator))
            rows = [(policy, budget) for policy in caches.POLICIES for budget in BUDGETS]
            sets = [policy.keep(prompt, budget, generator) for policy, budget in rows]
            bounds = [caches.record_only(prompt, question.cells), caches.text_only(prompt)]
            *answers, with_record, with_text = probe.same_answers(prompt, torch.stack(sets + bounds))
            record.append(with_record)
            text.append(with_text)
            for (policy, budget), answer in zip(rows, answers, strict=True):
                same.setdefault((policy.name, policy.protect_text, budget), []).append(answer)
    return {
        "grid": grid,
        "prompt_tokens": statistics.mean(tokens),
        "full": share(full),
        "record_and_text": share(record),
        "text_only": share(text),
        "policies": [
            {"policy": name, "protect_text": protect, "budget": budget, **share(answers)}
            for (name, protect, budget), answers in same.items()
        ],
        "hit_rate": {
            name: {
                "tokens": _by_layer([hit.tokens for hit in measured]),
                "mass": _by_layer([hit.mass for hit in measured]),
            }
            for name, measured in hits.items()
        },
        "density": _by_layer(densities),
    }


def shape(grid: str) -> tuple[int, int]:
    """(rows, cols) of "16x16"."""
    rows, cols = grid.split("x")
    return int(rows), int(cols)


def share(answers: list[bool]) -> Json:
    """Count, share and its 95 % Wilson interval."""
    n, k, z = len(answers), sum(answers), 1.96
    centre, width = k / n + z * z / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * width) / (1 + z * z / n) for sign in (-1, 1))
    return {"n": n, "count": k, "share": round(k / n, 4), "interval": [round(max(low, 0), 4), round(min(high, 1), 4)]}


def _by_layer(rows: list[list[float]]) -> list[float]:
    return [round(statistics.mean(column), 4) for column in zip(*rows, strict=True)]


def digest(folder: Path) -> str:
    """SHA-256 of the weights, which ties a results file to a checkpoint."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="name of a bundled checkpoint, or a folder")
    parser.add_argument("--images", type=int, default=100, help="per grid at full cache, 4 questions each")
    parser.add_argument("--compressed-images", type=int, default=50, help="per grid with compressed caches")
    parser.add_argument("--full-grids", nargs="*", default=FULL_GRIDS)
    parser.add_argument("--compressed-grids", nargs="*", default=COMPRESSED_GRIDS)
    parser.add_argument(
        "--output", type=Path, help="results file (default: results/<checkpoint>.json beside this file)"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    folder = checkpoint.folder(options.checkpoint)  # an absolute or relative folder that exists is taken as it is
    folder = folder if folder.exists() else Path(options.checkpoint)
    probe = Probe(folder)
    began = time.monotonic()

    def progress(value: Json) -> Json:
        full = value.get("full", value)
        minutes = (time.monotonic() - began) / 60
        print(f"{value['grid']}: full cache {full['count']}/{full['n']}  {minutes:.1f} min", flush=True)
        for row in value.get("policies", ()):
            text = "text protected" if row["protect_text"] else ""
            print(f"  {row['policy']:34} {row['budget']:5} {row['share']:.3f} {text}")
        return value

    results = {
        "command": f"python -m models.tinyvlm.evaluate {shlex.join(sys.argv[1:])}",
        "host": {"processor": platform.machine(), "threads": options.threads, "dtype": "float32"},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "weights_sha256": digest(folder),
        "first_seed": FIRST_SEED,
        "exact_match": [progress(exact_match(probe, grid, options.images)) for grid in options.full_grids],
        "compressed": [
            progress(compressed(probe, grid, options.compressed_images)) for grid in options.compressed_grids
        ],
    }
    output = options.output or checkpoint.HERE / "results" / f"{folder.name}.json"
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
