"""Reading: a text with facts in it, and questions whose answers are copied from the text, for models that know English.

A text is prose (`prose.py`) with facts at random places, or a list of facts.  The assistant's turn is begun for
the model (`Question.opening`), so that a small model answers in the wanted form; then an answer is right when the
greedy continuation is `Question.answer`, to the letter.  In all tasks but `needle` the opening also holds the answer's
first word or digit: a small model would rather begin with "a" or "not", and the first token of an answer comes from
prefill anyway, so that it tells nothing about a compressed cache.

The same task, size and seed give the same text everywhere.  Seeds from FIRST_DEVELOPMENT_SEED on are for choosing,
seeds from FIRST_TEST_SEED on for reporting.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from vlcache_sgl.evaluation.tasks import prose

FIRST_DEVELOPMENT_SEED = 100
FIRST_TEST_SEED = 1000
CHARACTERS_PER_TOKEN = 4.5
"""Characters per token of prose in SmolLM2's vocabulary; sizes are nominal."""
TOKENS_PER_ENTRY = 13
"""Tokens of one entry of a list."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLOURS = _words("red blue green black white yellow brown purple orange pink golden silver")
OBJECTS = _words("lamp box door chair table bottle car cup hat bag phone bike tent drum")
PLACES = _words("library school museum church cellar office hotel garage theatre bakery farm")
NUMBERS = _words("phone room locker table")
PREPOSITIONS = _words("under behind beside")
GOODS = _words(
    "rice honey nails soap cheese candles paper butter apples rope onions sugar coffee eggs flour thread beans milk "
    "nuts pepper carrots lemons grapes salt"
)
ADJECTIVES = _words("old small tired quiet young tall happy clever hungry brave")
ANIMALS = _words("dog cat horse goat fox bear goose donkey rabbit duck")
VERBS = _words("waits sleeps sings hides eats dances reads works")
NAMES = _words(
    "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nathan Olivia Peter Quinn Rachel Sam Tina "
    "Ursula Victor Wendy Xavier Yvonne Zach Anna Brian Clara Daniel Ellen Felix Gina Harold Iris James Kate Lucas "
    "Monica Noah Paula Robert Sarah Thomas Vera Walter Julia Martin Laura Simon Helen Oscar Diana Philip Ruth Edward "
    "Nina George Eva Arthur Lucy Hugo Ida Oliver Martha Stephen Rose Adam Jane Charles Susan Max Linda Paul Judith "
    "Andrew Barbara Eric Nora Patrick Amy Richard Molly Tom Joan Mark Sophie Ralph Betty Kevin Dora Roger Alma Luke "
    "Flora Ben Agnes Carl Hannah Ivan Ella Otto Mary Joe Fiona Dennis Greta Stuart Elsa Gordon Marion Keith Naomi"
)


@dataclass(frozen=True)
class Question:
    """A question about a text, in the three parts that a prompt is made of."""

    text: str
    """What the user asks, behind the text."""
    opening: str
    """The beginning of the assistant's turn, given to the model."""
    answer: str
    """What must follow the opening; several tokens, which a compressed cache must still hold."""


@dataclass(frozen=True)
class Document:
    """A text and the questions that can be asked about it."""

    task: str
    tokens: int
    """Nominal size of the text in tokens."""
    seed: int
    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Fact:
    """A sentence to hide in a text, and the question that it answers."""

    sentence: str
    question: Question


def make_document(task: str, tokens: int, seed: int) -> Document:
    """The document of one of TASKS with about that many tokens of text.

    Raises ValueError for a task that does not exist.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of: {', '.join(TASKS)}")
    rng = random.Random(f"{task}-{tokens}-{seed}")
    text, questions = TASKS[task](rng, tokens)
    return Document(task, tokens, seed, text, questions)


def words() -> str:
    """Everything that facts are made of, as it is spelled in them: prose aside, documents have no other tokens."""
    lists = (COLOURS, OBJECTS, PLACES, NUMBERS, PREPOSITIONS, GOODS, ADJECTIVES, ANIMALS, VERBS, NAMES)
    inside = " ".join(word for words in lists for word in words)
    facts = [make(random.Random(0), 1)[0].sentence for make in (_codes, _phones, _keys, _notes, _purchases)]
    return "\n".join([f" {inside} 0123456789.", *NAMES, *facts, "", "\n"])


# -- facts: each kind with as many as asked for, no two about the same thing ------------------------------------------


def _codes(rng: random.Random, count: int) -> list[Fact]:
    """A number is copied, digit by digit."""
    things = rng.sample([f"{colour} {thing}" for colour in COLOURS for thing in OBJECTS], count)
    return [_code_fact(f"the code of the {thing}", _digits(rng)) for thing in things]


def _phones(rng: random.Random, count: int) -> list[Fact]:
    """Also numbers of rooms and so on, once everybody has a phone."""
    names = rng.sample(NAMES, len(NAMES))
    subjects = [f"the {kind} number of {name}" for kind in NUMBERS for name in names][:count]
    facts = [_code_fact(subject, _digits(rng)) for subject in rng.sample(subjects, count)]
    return [Fact(f.sentence, _begun(f.question.text, f.question.opening, f.question.answer)) for f in facts]


def _code_fact(subject: str, number: str) -> Fact:
    begin = f"{subject[0].upper()}{subject[1:]} is"
    return Fact(f"{begin} {number}.", Question(f"What is {subject}?", begin, f" {number}"))


def _digits(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(4))


def _keys(rng: random.Random, count: int) -> list[Fact]:
    """Asked in other words than the text's."""
    facts = []
    for name, place in zip(rng.sample(NAMES, count), rng.sample(PLACES, count), strict=True):
        where = f" {_thing(rng)} of {rng.choice(NAMES)}"
        question = _begun(f"Where is the {place} key?", f"The {place} key is in the", where)
        facts.append(Fact(f"{name} keeps the key of the {place} in the{where}.", question))
    return facts


def _notes(rng: random.Random, count: int) -> list[Fact]:
    """A sentence is copied."""
    facts = []
    for name in rng.sample(NAMES, count):
        who = f"{rng.choice(ADJECTIVES)} {rng.choice(ANIMALS)} {rng.choice(VERBS)}"
        words = f" {who} {rng.choice(PREPOSITIONS)} the {_thing(rng)}"
        question = _begun(f"What does the note of {name} say?", f'The note of {name} says: "The', words)
        facts.append(Fact(f'The note of {name} says: "The{words}."', question))
    return facts


def _purchases(rng: random.Random, count: int) -> list[Fact]:
    """Four things in order."""
    facts = []
    for name in rng.sample(NAMES, count):
        goods = " " + ", ".join(rng.sample(GOODS, 4))
        begin = f"{name} bought four things:"
        facts.append(Fact(f"{begin}{goods}.", _begun(f"Which four things did {name} buy?", begin, goods)))
    return facts


def _thing(rng: random.Random) -> str:
    return f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}"


def _begun(text: str, opening: str, answer: str) -> Question:
    """The question with the answer's first word, or first digit, moved to the opening."""
    end = 2 if answer[1].isdigit() else (answer + " ").index(" ", 1)
    return Question(text, opening + answer[:end], answer[end:])


# -- tasks -------------------------------------------------------------------------------------------------------------

Content = tuple[str, tuple[Question, ...]]


Task = Callable[[random.Random, int], Content]


def _hidden(facts: Callable[[random.Random, int], list[Fact]]) -> Task:
    """Two facts of a kind in prose, both asked for."""

    def task(rng: random.Random, tokens: int) -> Content:
        chosen = facts(rng, 2)
        return _in_prose(rng, chosen, tokens), tuple(fact.question for fact in chosen)

    return task


def _in_prose(rng: random.Random, facts: list[Fact], tokens: int) -> str:
    """Prose with each fact at a random place between two sentences, also at either end."""
    room = tokens * CHARACTERS_PER_TOKEN - sum(len(fact.sentence) for fact in facts)
    paragraphs = prose.paragraphs(rng, int(room))
    for fact in facts:
        paragraph = rng.choice(paragraphs)
        paragraph.insert(rng.randint(0, len(paragraph)), fact.sentence)
    return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)


def _list(rng: random.Random, tokens: int) -> Content:
    """A fact per line; the questions in another order."""
    facts = _phones(rng, max(2, tokens // TOKENS_PER_ENTRY))
    asked = rng.sample(facts, min(8, len(facts)))
    return "\n".join(fact.sentence for fact in facts), tuple(fact.question for fact in asked)


def _both(rng: random.Random, tokens: int) -> Content:
    """An answer that needs two facts from different places."""
    facts = _codes(rng, 2)
    first, second = (fact.question.opening.removeprefix("The code of ").removesuffix(" is") for fact in facts)
    numbers = [fact.question.answer for fact in facts]
    pair = f"the codes of {first} and {second}"
    question = _begun(f"What are {pair}?", f"The{pair[3:]} are", f"{numbers[0]} and{numbers[1]}")
    return _in_prose(rng, facts, tokens), (question,)


def _several(rng: random.Random, tokens: int) -> Content:
    """One text, a question of every kind."""
    facts = [*_codes(rng, 2), *_keys(rng, 2), *_notes(rng, 2), *_purchases(rng, 2)]
    rng.shuffle(facts)
    return _in_prose(rng, facts, tokens), tuple(fact.question for fact in facts)


TASKS: dict[str, Task] = {
    "needle": _hidden(_codes),
    "list": _list,
    "both": _both,
    "reworded": _hidden(_keys),
    "sentence": _hidden(_notes),
    "items": _hidden(_purchases),
    "several": _several,
}
