"""Ask every question under every condition, write each answer down at once, and go on where an earlier run stopped."""

from __future__ import annotations

import functools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from vlcache_sgl.client.client import Client, data_url, said
from vlcache_sgl.evaluation.data import Asked, Sample
from vlcache_sgl.evaluation.forced import Forcing, NotMeasured
from vlcache_sgl.evaluation.scores import score

Sharing = Literal["shared", "private"]
Record = dict[str, Any]
"""One sample under one condition: `sample`, `task`, `condition`, and `questions`, a list of what was answered."""

FULL = "full"
"""Name of the uncompressed condition."""
PRIVATE = " private"
"""End of the name of a condition without sharing."""
FORCED = {"answer_logprob", "not_forced"}
"""What an entry has one of when its right answer was forced."""
ANSWERS = "answers.jsonl"


class EvalError(RuntimeError):
    """An evaluation cannot go on; the message says why."""


@dataclass(frozen=True)
class Condition:
    """How the questions about an image are served."""

    policy: str | None
    """None: the full cache."""
    budget: str
    sharing: Sharing = "shared"
    """``shared``: later questions about an image find what the first one has compressed; ``private``: each question
    compresses the image for itself."""

    @property
    def name(self) -> str:
        """``full``, ``vlcache@0.1`` or ``vlcache@0.1 private``."""
        if self.policy is None:
            return FULL
        return f"{self.policy}@{self.budget}" + (PRIVATE if self.sharing == "private" else "")

    @property
    def custom_params(self) -> dict[str, Any]:
        """What a request must say."""
        return {"kv_budget": "1.0"} if self.policy is None else {"kv_policy": self.policy, "kv_budget": self.budget}


def parse_condition(name: str) -> Condition:
    """The condition of that name.

    >>> parse_condition("scorer=snapkv,allocator=vlcache@0.1 private").sharing
    'private'
    """
    if name == FULL:
        return Condition(None, "1.0")
    text, private, _ = name.partition(PRIVATE)
    policy, _, budget = text.rpartition("@")
    return Condition(policy, budget, "private" if private else "shared")


class Answers:
    """The answers of a folder, one line per sample and condition, appended as they come."""

    def __init__(self, folder: Path, model: str) -> None:
        """Open or begin the folder.

        Raises:
            EvalError: when it holds answers of another model.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / ANSWERS
        self._lock = threading.Lock()
        self._records: dict[tuple[str, str], Record] = {}
        if not self._path.exists():
            self._path.write_text(json.dumps({"model": model}) + "\n")
            return
        head, *lines = self._path.read_text().splitlines()
        if (known := json.loads(head).get("model")) != model:
            raise EvalError(f"{folder} holds answers of {known}, not of {model}; choose another --output")
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                break  # cut off when a run was killed; what follows it is asked again
            self._put(record)
        self._path.write_text("\n".join([head, *map(json.dumps, self.records)]) + "\n")

    @property
    def records(self) -> list[Record]:
        """In the order in which they came."""
        return list(self._records.values())

    def _put(self, record: Record) -> None:
        key = (record["sample"], record["condition"])
        self._records.pop(key, None)
        self._records[key] = record

    def done(self, forced: bool = False) -> set[tuple[str, str]]:
        """Pairs of sample and condition; with `forced` only those whose right answers were forced too."""
        return {
            (record["sample"], record["condition"])
            for record in self.records
            if not forced or all(FORCED & question.keys() for question in record["questions"])
        }

    def of(self, condition: Condition, samples: Sequence[Sample]) -> list[Record]:
        """What was answered about these samples under one condition."""
        ids = {sample.id for sample in samples}
        return [record for name, record in self._records.items() if name[0] in ids and name[1] == condition.name]

    def add(self, record: Record) -> None:
        """Write one down; an earlier record of the same sample and condition counts no more."""
        with self._lock:
            self._put(record)
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def missing(
    samples: Sequence[Sample], conditions: Sequence[Condition], done: set[tuple[str, str]]
) -> list[tuple[Sample, Condition]]:
    """What is still to be asked, all conditions of a sample together and each time in another order: a slow minute of
    the machine, or an evaluation that is cut short, then falls on all conditions alike."""
    found = []
    for number, sample in enumerate(samples):
        shift = number % len(conditions)
        for condition in (*conditions[shift:], *conditions[:shift]):
            alone = len(sample.questions) == 1 and condition.sharing == "private"  # the same as shared
            if not alone and (sample.id, condition.name) not in done:
                found.append((sample, condition))
    return found


def ask(
    client: Client,
    sample: Sample,
    condition: Condition,
    on_answer: Callable[[], None] = lambda: None,
    forcing: Forcing | None = None,
) -> Record:
    """One sample under one condition, its questions one after the other.

    With `forcing` the first accepted answer to each question is also forced, in prefixes of its own: the answer that
    the model gives and the one that is forced are each behind a prompt that was compressed for it.

    Raises:
        EvalError: when the server refuses a request.
    """
    images = _urls(sample)
    # A prefix of its own: neither earlier runs nor other samples have compressed these images.
    salt = uuid.uuid4().hex
    answered = []
    for number, question in enumerate(sample.questions):
        own_salt = salt if condition.sharing == "shared" else f"{salt}-{number}"
        options: dict[str, Any] = {"ignore_eos": True} if question.ignore_eos else {}
        started = time.perf_counter()
        try:
            answer = client.ask(
                question.text,
                *images,
                max_tokens=question.max_tokens,
                logprobs=question.ignore_eos,
                custom_params=condition.custom_params,
                cache_salt=own_salt,
                return_meta_info=True,
                **options,
            )
        except Exception as error:
            raise EvalError(f"{condition.name}, {sample.id}: {said(error)}") from error
        report = answer.report
        entry: Record = {
            "answer": answer.text.strip(),
            "score": round(score(question.metric, answer.text, question.answers), 4),
            "prompt_tokens": answer.prompt_tokens,
            "cached_tokens": answer.cached_tokens,
            "ratio": report.get("ratio", 1.0),
            "seconds": round(time.perf_counter() - started, 3),
        }
        if "failed" in report:
            entry["failed"] = report["failed"]
        if question.ignore_eos:
            choice = answer.choices[0]
            entry["tokens"] = list(choice.tokens)
            entry["logprobs"] = [round(value, 4) for value in choice.logprobs]
        if forcing is not None:
            entry |= _force(forcing, question, images, condition, f"{own_salt}-forced", sample)
        answered.append(entry)
        on_answer()
    return {"sample": sample.id, "task": sample.task, "condition": condition.name, "questions": answered}


def _force(
    forcing: Forcing, question: Asked, images: Sequence[str], condition: Condition, salt: str, sample: Sample
) -> Record:
    """`answer_logprob` and `answer_tokens`, or `not_forced` with the reason."""
    try:
        forced = forcing(question.text, images, question.answers[0], condition.custom_params, salt)
    except NotMeasured as error:
        return {"not_forced": str(error)}
    except httpx.HTTPError as error:
        raise EvalError(f"{condition.name}, {sample.id}: {said(error)}") from error
    return {"answer_logprob": round(forced.logprob, 5), "answer_tokens": forced.tokens}


@functools.lru_cache(maxsize=8)
def _urls(sample: Sample) -> tuple[str, ...]:
    """A sample's images, encoded once for all conditions."""
    return tuple(data_url(image) for image in sample.open_images())


def ask_all(
    client: Client,
    work: Sequence[tuple[Sample, Condition]],
    answers: Answers,
    *,
    at_once: int = 1,
    time_limit_s: float | None = None,
    on_answer: Callable[[], None] = lambda: None,
    forcing: Forcing | None = None,
) -> Iterator[Record]:
    """Work through `work`; yields each record once it is written down.

    After `time_limit_s` seconds nothing new is begun.  The first error ends everything.
    """
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    stop = threading.Event()

    def one(sample: Sample, condition: Condition) -> Record | None:
        if stop.is_set() or (deadline is not None and time.monotonic() > deadline):
            return None
        record = ask(client, sample, condition, on_answer, forcing)
        answers.add(record)
        return record

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(one, sample, condition) for sample, condition in work]
        try:
            for future in as_completed(futures):
                record = future.result()
                if record is not None:
                    yield record
        finally:
            stop.set()
