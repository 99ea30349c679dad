"""Images or documents, questions and accepted answers: the bundled tasks, and folders of one's own.

A dataset of one's own is a JSONL file; each line is one set of images, or one text, with its questions::

    {"id": "17", "images": ["17.png"], "question": "What is the total?", "answers": ["12.50"], "metric": "anls"}
    {"image": "a.png", "questions": [{"question": "...", "answers": ["..."]}, {"question": "...", "answers": ["..."]}]}
    {"text": "A long document ...", "question": "Who signed?", "answers": ["Ada", "Ada Lovelace"], "metric": "begins"}

`images` (or `image`, a single one) are paths relative to the file.  `text` stands in front of each question; a line
without images needs a server with `--kv-scope all`.  Any of `answers` is right.  `metric` is one of `scores.METRICS`
(default: exact), `max_tokens` bounds the answer (default 32); both may stand in the line or in a question.  Several
questions in one line are asked as separate requests, in this order: the first compresses images and text, the others
find them so.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlcache_sgl.evaluation.scores import METRICS
from vlcache_sgl.evaluation.tasks.receipts import Question, Receipt, make_receipt

FIRST_SEED = 40_000
"""Held-out images; the demo, the tests and the training of the bundled model use other seeds."""
SIDE = 24
NUM_QUESTIONS = 8
"""Questions per image of the task `requery`."""
LONG_TOKENS = 96
DEFAULT_TOKENS = 32


class DataError(ValueError):
    """A dataset cannot be read; the message names file and line."""


@dataclass(frozen=True)
class Asked:
    """One question about the images of a sample."""

    text: str
    answers: tuple[str, ...]
    """Any of these is right."""
    metric: str = "exact"
    max_tokens: int = DEFAULT_TOKENS
    ignore_eos: bool = False
    """Generate `max_tokens` whatever comes: to compare long outputs token by token."""


@dataclass(frozen=True)
class Sample:
    """Images with the questions that are asked about them, one after the other."""

    id: str
    task: str
    questions: tuple[Asked, ...]
    open_images: Callable[[], list[Image.Image]] = field(compare=False)
    """Reads or draws the images, so that a large dataset is not held in memory."""
    text_only: bool = False
    """Whether there are none."""


def load_jsonl(path: Path, limit: int | None = None) -> list[Sample]:
    """The samples of a file in the format above, at most `limit`.

    Raises:
        DataError: for a line that does not fit, naming it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    found: list[Sample] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (limit is None or len(found) < limit):
            found.append(_sample(line, path, number))
    if not found:
        raise DataError(f"{path}: no samples")
    if len({sample.id for sample in found}) < len(found):
        raise DataError(f"{path}: some samples have the same id")
    return found


_LINE_KEYS = {"id", "image", "images", "text", "question", "answers", "questions", "metric", "max_tokens"}
_QUESTION_KEYS = {"question", "answers", "metric", "max_tokens"}


def _sample(line: str, path: Path, number: int) -> Sample:
    def wrong(what: str) -> DataError:
        return DataError(f"{path}, line {number}: {what}")

    try:
        entry = json.loads(line)
    except ValueError as error:
        raise wrong(f"not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise wrong("not an object")
    if unknown := sorted(set(entry) - _LINE_KEYS):
        raise wrong(f"unknown {', '.join(unknown)}; known: {', '.join(sorted(_LINE_KEYS))}")
    images = entry.get("images", [entry["image"]] if "image" in entry else [])
    if not isinstance(images, list) or not all(isinstance(one, str) for one in images):
        raise wrong("`images` must be a list of paths")
    if not isinstance(text := entry.get("text", ""), str):
        raise wrong("`text` must be a text")
    paths = [path.parent / one for one in images]
    if missing := [str(one) for one in paths if not one.is_file()]:
        raise wrong(f"no such image: {missing[0]}")
    if unreadable := [str(one) for one in paths if not _is_image(one)]:
        raise wrong(f"not an image: {unreadable[0]}")
    asked = entry.get("questions", [{key: entry[key] for key in ("question", "answers") if key in entry}])
    if not isinstance(asked, list) or not asked:
        raise wrong("`questions` must be a list")
    defaults = {key: entry[key] for key in ("metric", "max_tokens") if key in entry}
    try:
        questions = tuple(_question({**defaults, **one}, text) for one in asked)
    except (TypeError, ValueError) as error:
        raise wrong(str(error)) from error
    name = str(entry.get("id", f"{path.stem}-{number}"))
    return Sample(name, path.stem, questions, functools.partial(_open_all, paths), text_only=not paths)


def _question(entry: Mapping[str, Any], document: str) -> Asked:
    if unknown := sorted(set(entry) - _QUESTION_KEYS):
        raise ValueError(f"unknown {', '.join(unknown)} in a question")
    text, answers = entry.get("question"), entry.get("answers")
    if not isinstance(text, str) or not text:
        raise ValueError("`question` must be a text")
    if not isinstance(answers, list) or not answers or not all(isinstance(one, (str, int, float)) for one in answers):
        raise ValueError("`answers` must be a list of texts")
    metric, max_tokens = entry.get("metric", "exact"), entry.get("max_tokens", DEFAULT_TOKENS)
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose one of: {', '.join(METRICS)}")
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"`max_tokens` must be a positive whole number, got {max_tokens!r}")
    text = f"{document}\n\n{text}" if document else text
    return Asked(text, tuple(str(one) for one in answers), metric, max_tokens)


def _is_image(path: Path) -> bool:
    """Whether the file begins like an image; only its head is read."""
    try:
        with Image.open(path):
            return True
    except (UnidentifiedImageError, OSError):
        return False


def _open_all(paths: list[Path]) -> list[Image.Image]:
    """
    Raises:
        DataError: for an image that is cut off.
    """
    opened = []
    for path in paths:
        try:
            opened.append(Image.open(path).convert("RGB"))
        except (OSError, SyntaxError) as error:  # what Pillow's readers raise for broken files
            raise DataError(f"{path}: {error}") from error
    return opened


# -- bundled tasks ----------------------------------------------------------------------------------------------------


def _drawn(seed: int, rows: int, cols: int, questions: int, fill: float | None = None) -> Receipt:
    return make_receipt(seed, rows, cols, num_questions=questions, fill=fill)


def single(number: int) -> Sample:
    """One image, one question."""
    receipt = _drawn(FIRST_SEED + number, SIDE, SIDE, 1)
    return Sample(f"single-{number}", "single", _ask(receipt.questions[:1]), lambda: [receipt.image])


def requery(number: int) -> Sample:
    """One image, NUM_QUESTIONS questions, each a request of its own; they may share the image's compressed copy."""
    receipt = _drawn(FIRST_SEED + 1000 + number, SIDE, SIDE, NUM_QUESTIONS)
    return Sample(f"requery-{number}", "requery", _ask(receipt.questions), lambda: [receipt.image])


def receipts(seed: int, questions: int) -> Sample:
    """The image of that seed with so many questions: for images that no task of `TASKS` shows."""
    receipt = _drawn(seed, SIDE, SIDE, questions)
    return Sample(f"receipt-{seed} x{questions}", "receipts", _ask(receipt.questions), lambda: [receipt.image])


def images(number: int) -> Sample:
    """Three images, one question that only one of them answers."""
    seeds = [FIRST_SEED + 2000 + 3 * number + i for i in range(3)]
    receipts = [_drawn(seed, 16, 20, 200, fill=0.4) for seed in seeds]
    place = int(np.random.default_rng(seeds[0]).integers(0, 3))
    elsewhere = {q.record.label for i, other in enumerate(receipts) if i != place for q in other.questions}
    question = next(q for q in receipts[place].questions if q.record.label not in elsewhere)
    return Sample(f"images-{number}", "images", _ask([question]), lambda: [receipt.image for receipt in receipts])


def long(number: int) -> Sample:
    """One image, one question, LONG_TOKENS tokens of output; only the beginning has a known answer, so what is of
    interest is how far the output follows that of the full cache."""
    receipt = _drawn(FIRST_SEED + 3000 + number, SIDE, SIDE, 1)
    question = receipt.questions[0]
    asked = Asked(question.text, (question.answer,), "begins", max_tokens=LONG_TOKENS, ignore_eos=True)
    return Sample(f"long-{number}", "long", (asked,), lambda: [receipt.image])


TASKS: dict[str, Callable[[int], Sample]] = {"single": single, "images": images, "requery": requery, "long": long}
"""Bundled tasks: number of a sample -> sample.  The same number is the same image everywhere."""


def _ask(questions: Any) -> tuple[Asked, ...]:
    chosen: list[Question] = list(questions)
    return tuple(Asked(one.text, (one.answer,), max_tokens=8) for one in chosen)
