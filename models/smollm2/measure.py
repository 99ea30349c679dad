"""Count right answers of the text checkpoint at full cache: `python -m models.smollm2.measure` from the root.

Writes results/text.json.  A cell (task and size) that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from vlcache_sgl.evaluation.tasks import reading

from . import build, check

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "text.json"
SIZES = (250, 500, 1000, 2000)
QUESTIONS = 50
"""Per cell, at least: documents are read until so many were asked."""


@dataclass(frozen=True)
class Answered:
    """What became of one question."""

    right: bool
    """The greedy continuation begins with the answer's tokens."""
    log_probability: float
    """Mean over the answer's tokens, each given the right ones before it."""
    prompt_tokens: int


class Reader:
    """The text checkpoint in float32; a document is read once for all its questions."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def answer(self, document: reading.Document) -> list[Answered]:
        """Ask all questions of a document, each right behind the text.

        One pass with the right answer as input says both what is wanted to know: greedy decoding gives the answer
        exactly if, at each of its tokens, the most probable one is the right one.
        """
        head, _ = check.prompt_of(self.tokenizer, document.text + "\n\n\0", "").split("\0")
        start = self._encode(head)
        cache = DynamicCache(config=self.model.config)
        self.model(torch.tensor([start]), past_key_values=cache, logits_to_keep=1)
        return [self._ask(question, len(start), cache) for question in document.questions]

    def _ask(self, question: reading.Question, start: int, cache: DynamicCache) -> Answered:
        _, tail = check.prompt_of(self.tokenizer, "\0" + question.text, question.opening).split("\0")
        prompt, answer = self._encode(tail), self._encode(question.answer)
        fed = torch.tensor([prompt + answer[:-1]])
        logits = self.model(fed, past_key_values=cache, logits_to_keep=len(answer)).logits[0]
        cache.crop(-fed.shape[1])
        scores = logits.log_softmax(-1)[range(len(answer)), answer]
        return Answered(logits.argmax(-1).tolist() == answer, scores.mean().item(), start + len(prompt))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


def measure(reader: Reader, task: str, size: int, first_seed: int, questions: int = QUESTIONS) -> dict[str, object]:
    """One cell: at least so many questions about documents from that seed on."""
    answered: list[Answered] = []
    seed = first_seed
    while len(answered) < questions:
        answered += reader.answer(reading.make_document(task, size, seed))
        seed += 1
    right = sum(one.right for one in answered)
    return {
        "task": task,
        "size": size,
        "seeds": [first_seed, seed - 1],
        "n": len(answered),
        "right": right,
        "log_probability": round(math.fsum(one.log_probability for one in answered) / len(answered), 4),
        "prompt_tokens": round(sum(one.prompt_tokens for one in answered) / len(answered)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=build.DEFAULT_OUTPUT / "text")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", choices=tuple(reading.TASKS), default=tuple(reading.TASKS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="per task and size, at least")
    parser.add_argument("--first-seed", type=int, default=reading.FIRST_DEVELOPMENT_SEED)
    options = parser.parse_args()
    torch.set_num_threads(1)  # others may use the machine too, and the figures do not depend on it
    cells = json.loads(options.results.read_text())["cells"] if options.results.exists() else []
    done = {(cell["task"], cell["size"], cell["seeds"][0]) for cell in cells}
    reader = Reader(options.model)
    for size in options.sizes:
        for task in options.tasks:
            if (task, size, options.first_seed) in done:
                continue
            cell = measure(reader, task, size, options.first_seed, options.questions)
            print(f"{task} {size}: {cell['right']} of {cell['n']}, {cell['prompt_tokens']} prompt tokens", flush=True)
            cells.append(cell)
            command = f"python -m models.smollm2.measure {shlex.join(sys.argv[1:])}".strip()
            record = {"command": command, "transformers": transformers.__version__, "torch": torch.__version__}
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(record | {"cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
