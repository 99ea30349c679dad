"""How many evicted tokens the bundled models need back: they read codes from images of 576 tokens.

python -m benchmarks.judge.instruments                      # writes the page
python -m benchmarks.judge.instruments --first-seed 500     # other images, to out/ only
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.judge.turn import TurnedSketch, balanced, moments, spread
from models.tinyvlm.caches import CachePolicy
from models.tinyvlm.probe import Probe, Prompt
from vlcache_sgl.api.testing import PlainRotary
from vlcache_sgl.evaluation.stats import interval
from vlcache_sgl.evaluation.tasks.receipts import Question, Receipt, make_receipt
from vlcache_sgl.recall.sketch import KeySketch

from ..common.host import ROOT, command_line, host_block
from ..common.results import save
from . import recall_page
from .main import dump
from .recalling import FITTED, Keys, Sketch

MODELS = ("grounded", "ungrounded")
FIRST_SEED = 3000
"""Images that nothing else was tuned or measured on."""
IMAGES, QUESTIONS = 10, 4
SIDE = 24
BUDGET = 0.1
TOKENS = (0, 4, 8, 16, 32, 64)
POLICIES = (
    CachePolicy("post-vision, density", "post-vision", "density", 0.5),
    CachePolicy("sliding window", "sliding window", sink=4),
)
SKETCHES = ("signs", "model", "keys")
"""Signs; signs after a turn that was fitted to the model on random tokens; the keys themselves."""
QUICK = ROOT / "out/judge/instruments.json"


class RecallingProbe(Probe):
    """A probe whose decoded rows get evicted tokens back."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        text = self.model.config.text_config
        self._kv_heads = text.num_key_value_heads
        self._read: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._tokens = torch.zeros(0, dtype=torch.int64)
        self._layers_sketch: list[Sketch] = []
        self._prompt_keys: list[torch.Tensor] = []
        self.sketches: dict[str, list[Sketch]] = {
            "signs": [KeySketch(text.hidden_size // text.num_attention_heads, "cpu")] * self.layers,
            "model": list(self._fitted(text.rope_parameters["rope_theta"], text.vocab_size)),
            "keys": [Keys()] * self.layers,
        }

    @torch.no_grad()
    def _fitted(self, theta: float, vocabulary: int) -> Iterator[Sketch]:
        ids = torch.randint(0, vocabulary, (1, FITTED), generator=torch.Generator().manual_seed(0))
        ids[ids >= self.model.config.vision_start_token_id] = 0  # no image follows
        with self._states() as seen:
            self.model(input_ids=ids)
        for queries, keys in seen:
            found = moments(keys[0].transpose(0, 1), queries[0].transpose(0, 1))
            yield TurnedSketch(balanced(spread(found, PlainRotary(theta=theta))))

    @contextmanager
    def _states(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        self._read = []
        try:
            yield self._read
        finally:
            self._read = None

    def prompt_keys(self, prompt: Prompt) -> list[torch.Tensor]:
        """`[n, K, D]` of each layer."""
        return [layer.keys[0, :, : prompt.tokens].transpose(0, 1) for layer in prompt._cache.layers]

    def recalled_answers(self, prompt: Prompt, keep: torch.Tensor, tokens: Sequence[int], sketch: str) -> list[bool]:
        """As `same_answers`, with so many tokens back in each layer and row of each set."""
        self._tokens = torch.tensor(tokens)
        self._layers_sketch, self._prompt_keys = self.sketches[sketch], self.prompt_keys(prompt)
        try:
            return self.same_answers(prompt, keep)
        finally:
            self._layers_sketch = []

    def _attend(self, module: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any, **other: Any) -> Any:
        if self._read is not None and hasattr(module, "layer_idx"):
            self._read.append((query, key))
        return super()._attend(module, query, key, *rest, **other)

    def _seen(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        kept = super()._seen(layer, rows)
        if not self._layers_sketch:
            return kept
        sketch, keys = self._layers_sketch[layer], self._prompt_keys[layer]
        by_head = rows.unflatten(1, (self._kv_heads, -1)).transpose(0, 1)  # [K, sets, g, rows, D]
        logits = sketch.scores(by_head.flatten(0, 3), sketch.encode(keys)).view(*by_head.shape[:-1], -1)
        hidden = kept[:, None].expand(-1, -1, rows.shape[2], -1)
        shares = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0).sum((0, 2))  # [sets, rows, n]
        most = min(int(self._tokens.max()), shares.shape[-1])
        best = shares.masked_fill(hidden[:, 0], -1).topk(most).indices
        wanted = (torch.arange(most) < self._tokens[:, None, None]).expand(best.shape)
        return hidden[:, 0] | torch.zeros(shares.shape, dtype=torch.bool).scatter_(-1, best, wanted)


def measure(probe: RecallingProbe, receipts: Sequence[Receipt], budget: float) -> Iterator[dict[str, Any]]:
    """A row per policy, sketch and number of tokens: answers that are the full cache's, and right ones."""
    arms = list(itertools.product(POLICIES, TOKENS))
    same: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for number, receipt in enumerate(receipts):
        generator = torch.Generator().manual_seed(number)
        for question in receipt.questions:
            for arm, right in _answers(probe, receipt, question, arms, budget, generator):
                same.setdefault(arm, {}).setdefault(str(number), []).append(float(right))
    for (policy, sketch, tokens), groups in same.items():
        scores = [score for mine in groups.values() for score in mine]
        yield {
            "policy": policy,
            "sketch": sketch,
            "tokens": tokens,
            "count": len(scores),
            "same": round(sum(scores) / len(scores), 4),
            "interval": [round(end, 4) for end in interval(groups)],
        }


def _answers(
    probe: RecallingProbe,
    receipt: Receipt,
    question: Question,
    arms: Sequence[tuple[CachePolicy, int]],
    budget: float,
    generator: torch.Generator,
) -> Iterator[tuple[tuple[str, str, int], bool]]:
    prompt = probe.prefill(receipt, question)
    sets = {policy: policy.keep(prompt, budget, generator) for policy in POLICIES}
    keep = torch.stack([sets[policy] for policy, _ in arms])
    for sketch in SKETCHES:
        found = probe.recalled_answers(prompt, keep, [tokens for _, tokens in arms], sketch)
        for (policy, tokens), same in zip(arms, found, strict=True):
            yield (policy.name, sketch, tokens), same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--images", type=int, default=IMAGES, help=f"with {QUESTIONS} questions each")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--budget", type=float, default=BUDGET)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/ for everything, out/ for less")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Measure, write the result, and the page if the result is the committed one."""
    started = host_block()
    torch.set_num_threads(2)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.images)
    receipts = [make_receipt(seed, SIDE, SIDE, num_questions=QUESTIONS) for seed in seeds]
    rows = []
    for model in arguments.models:
        probe = RecallingProbe(ROOT / "models/tinyvlm" / model)
        rows += [{"model": model, **row} for row in measure(probe, receipts, arguments.budget)]
    result = {
        "task": "judge-instruments",
        "command": command_line(),
        "host": started,
        "seeds": f"{seeds[0]}-{seeds[-1]}",
        "budget": arguments.budget,
        "summary": rows,
    }
    output = arguments.output or (recall_page.INSTRUMENTS if len(sys.argv) == 1 else QUICK)
    save(output, result, dump(result))
    console.print(recall_page.instruments_table(result), soft_wrap=True, markup=False)
    if output.resolve() == recall_page.INSTRUMENTS:
        recall_page.write()
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    sys.exit(main(parser.parse_args(), Console() if sys.stdout.isatty() else Console(width=140)))
