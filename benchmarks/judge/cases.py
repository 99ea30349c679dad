"""Questions about texts, as tokens: what a server would be sent, cut where the judge has to know about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlcache_sgl.api import Span
from vlcache_sgl.evaluation.tasks.cells import split_text
from vlcache_sgl.evaluation.tasks.reading import Document, Question, make_document

FRAME = "\n"
"""What stands in front of and behind a line of the text: what the vision checkpoint's tokens around an image are."""
INSTRUCTION = "\n\nRepeat the previous context exactly."
"""What a second reading of the prompt begins with (KVzip)."""


@dataclass(frozen=True, order=True)
class CaseId:
    """Which text is asked about."""

    task: str
    tokens: int
    """Nominal size of the text."""
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}:{self.tokens}:{self.seed}"


@dataclass(frozen=True)
class Asked:
    """One question about a text."""

    prompt: tuple[int, ...]
    """Template, text, question, and the beginning of the assistant's turn."""
    lines: tuple[Span, ...]
    """Where the text's lines lie in it: what would be image tokens if each line were an image."""
    answer: tuple[int, ...]
    """What must follow."""


@dataclass(frozen=True)
class Case:
    """The question that compresses the text, and another one that finds what is left of it."""

    first: Asked
    later: Asked | None
    """None where the text has one question only."""


class CaseMaker:
    """Makes cases with a checkpoint's tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        placeholder = "<text>"
        turn = [{"role": "user", "content": placeholder}]
        template = self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        self._before, _, self._after = str(template).partition(placeholder)
        self.instruction = self.tokens(INSTRUCTION)

    def make(self, case: CaseId) -> Case:
        """The first two questions about the case's text."""
        document = make_document(case.task, case.tokens, case.seed)
        first, *others = (self._ask(document, question) for question in document.questions[:2])
        return Case(first, others[0] if others else None)

    def ask(self, case: CaseId, question: Question) -> Asked:
        """Another question about the case's text."""
        return self._ask(make_document(case.task, case.tokens, case.seed), question)

    def _ask(self, document: Document, question: Question) -> Asked:
        tokens, lines = [*self.tokens(self._before)], []
        for line in split_text(document.text, self._tokenizer):
            tokens += self.tokens(FRAME)
            lines.append(Span(len(tokens), len(tokens) + len(line)))
            tokens += (*line, *self.tokens(FRAME))
        tokens += self.tokens(f"\n{question.text}{self._after}{question.opening}")
        return Asked(tuple(tokens), tuple(lines), self.tokens(question.answer))

    def tokens(self, text: str) -> tuple[int, ...]:
        """Of a text alone."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))
