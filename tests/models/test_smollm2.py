"""The reading tasks and their images; the checkpoints that are built for them (slow: needs a package index)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlcache_sgl.evaluation.tasks import cells, prose, reading

ROOT = Path(__file__).resolve().parents[2]


SEEDS = (reading.FIRST_DEVELOPMENT_SEED, reading.FIRST_TEST_SEED)
SIZES = (250, 2000)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: enough to draw with, and no file is needed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", reading.TASKS)
def test_same_seed_same_document(task: str) -> None:
    first, second = (reading.make_document(task, 500, 1000) for _ in range(2))
    assert first == second
    assert reading.make_document(task, 500, 1001).text != first.text


@pytest.mark.parametrize(("task", "size", "seed"), list(itertools.product(reading.TASKS, SIZES, SEEDS)))
def test_answers_are_in_the_text(task: str, size: int, seed: int) -> None:
    """Word for word; where the answer joins two facts, in each of its parts."""
    document = reading.make_document(task, size, seed)
    lines = document.text.count("\n") + 1
    prose_tokens = len(document.text) / reading.CHARACTERS_PER_TOKEN
    tokens = lines * reading.TOKENS_PER_ENTRY if task == "list" else prose_tokens
    assert 0.9 * size < tokens < 1.7 * size
    for question in document.questions:
        parts = question.answer.split(" and ") if task == "both" else [question.answer]
        assert all(part.strip() in document.text for part in parts)
        assert question.text.endswith("?")


@pytest.mark.parametrize("task", reading.TASKS)
def test_questions_of_a_document_differ(task: str) -> None:
    for seed in range(SEEDS[0], SEEDS[0] + 20):
        questions = reading.make_document(task, 250, seed).questions
        assert len({question.text for question in questions}) == len(questions)


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'noodle'; choose one of: needle, list"):
        reading.make_document("noodle", 250, 100)


def test_prose_has_nothing_to_ask_for() -> None:
    sentences = [sentence for topic in prose.TOPICS for sentence in topic]
    assert len(set(sentences)) == len(sentences)
    assert all(sentence.endswith(".") and not any(c.isdigit() for c in sentence) for sentence in sentences)
    assert not [name for name in reading.NAMES for sentence in sentences if name in sentence.rstrip(".").split()]


# -- images -----------------------------------------------------------------------------------------------------------


def test_lines_hold_the_tokens_in_order(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn, with a newline or two between lines, is the text."""
    drawn: list[str] = []
    draw = cells.draw_line
    monkeypatch.setattr(cells, "draw_line", lambda texts: (drawn.append("".join(texts)), draw(texts))[1])
    text = reading.make_document("needle", 500, 100).text
    images = cells.draw_text(text, tokenizer)
    assert [image.size for image in images] == [(len(line) * cells.CELL, cells.CELL) for line in drawn]
    assert all(cells.MIN_CELLS <= len(line) <= cells.MAX_CELLS for line in drawn)
    rest = text
    for line in drawn:
        assert rest.startswith(line)
        rest = rest[len(line) :].lstrip("\n")
    assert not rest


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("a" * 150 + "\n\n" + "b" * 100, [150, 100]),
        ("a" * 60 + "\n" + "b" * 60 + "\n\n" + "c" * 60 + "\n" + "d" * 60, [122 - 1, 121]),
        ("a" * 60 + "\n" + "b" * 60 + "\n" + "c" * 120, [121, 120]),
        ("a" * 199, [199]),
        ("a" * 200, [196, 4]),
        ("a" * 201, [197, 4]),
    ],
    ids=["empty line", "empty line before a line's end", "line's end", "fits", "no room for one", "nor for two"],
)
def test_lines_end_where_the_text_allows(tokenizer: PreTrainedTokenizerFast, text: str, lengths: list[int]) -> None:
    assert [image.width // cells.CELL for image in cells.draw_text(text, tokenizer)] == lengths


def test_a_text_too_short_to_be_an_image_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="a line has 4 to 199 cells, not 3"):
        cells.draw_text("abc", tokenizer)


def test_cells_look_different() -> None:
    texts = ["a", " a", "A", " the", "the", " The", "\n", " ", "0", "O", "o", " lamp", " lamps", " something"]
    assert len({cells.draw_cell(text).tobytes() for text in texts}) == len(texts)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both checkpoints, from the package index; `build` itself checks answers and cells, and raises."""
    from models.smollm2.build import build_vision

    output = tmp_path_factory.mktemp("smollm2")
    build_vision(output)
    return output


@pytest.mark.slow
def test_what_is_built_is_not_built_again(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from models.smollm2.build import build_vision

    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    build_vision(built)
    assert capsys.readouterr().out.count("there already") == 2
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


@pytest.mark.slow
def test_every_document_is_readable_in_images(built: Path) -> None:
    from models.smollm2 import tower
    from models.smollm2.build import readable_texts

    tokenizer = PreTrainedTokenizerFast.from_pretrained(built / "text")
    readable = set(tower.readable(tokenizer, readable_texts()))
    for task, size, first in itertools.product(reading.TASKS, SIZES, SEEDS):
        for seed in range(first, first + 20):
            text = reading.make_document(task, size, seed).text
            unreadable = set(tokenizer.encode(text, add_special_tokens=False)) - readable
            assert not unreadable, tokenizer.convert_ids_to_tokens(sorted(unreadable))


def test_weights_that_are_not_the_known_ones_are_refused(tmp_path: Path) -> None:
    from models.smollm2 import source

    path = tmp_path / source.MEMBER
    path.parent.mkdir()
    path.write_bytes(b"other weights")
    with pytest.raises(source.SourceError, match=r"has SHA-256 .*: delete it and build again"):
        source.fetch(tmp_path)


def test_query_rows_come_apart_as_they_were_paired() -> None:
    """Against llama.cpp's pairing, written as its converter documents it: halves of a head, interleaved."""
    import torch

    from models.smollm2.text import _unpaired

    weight = torch.arange(24.0).reshape(12, 2)
    paired = torch.stack([weight.view(3, 4, 2)[:, [0, 2, 1, 3]]]).reshape(12, 2)
    assert torch.equal(_unpaired(paired, heads=3), weight)
