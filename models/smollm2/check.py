"""What a checkpoint must be able to do before it is used: the checks of the build, with transformers on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoProcessor,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
)

from vlcache_sgl.evaluation.tasks import cells, reading

from . import tower

QUESTION, ANSWER = "What is the capital of France?", "Paris"
ROUND_TRIPS = ("The code of the blue lamp is 7391.\nHello  world, it's naïve! 12.5", "日本 🙂\t\n\n x")
DOCUMENTS = tuple(("needle", 200, reading.FIRST_DEVELOPMENT_SEED + number) for number in range(3))
"""Task, size and seed of texts that both checkpoints read; most questions about them are answered rightly."""
ANSWER_TOKENS = 8
SLOT = "<|vision_start|><|image_pad|><|vision_end|>"


class CheckError(RuntimeError):
    """A checkpoint does not do what it is built for; the message is one line for the user."""


def text(folder: Path) -> str:
    """Check the text checkpoint; returns what was found, in words.

    Raises:
        CheckError: for a text that does not survive the tokenizer, or an answer that is wrong.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for sample in ROUND_TRIPS:
        back = tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False))
        if back != sample:
            raise CheckError(f"the tokenizer makes {back!r} of {sample!r}")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = _answer(model, tokenizer, QUESTION, "")
    if ANSWER not in answer:
        raise CheckError(f"{QUESTION!r} is answered {answer!r}, without {ANSWER!r}: the weights were not read rightly")
    right = 0
    for document in _documents():
        question = document.questions[0]
        answer = _answer(model, tokenizer, f"{document.text}\n\n{question.text}", question.opening)
        right += answer.startswith(question.answer)
    found = f"{right} of {len(DOCUMENTS)} answers copied rightly from a text"
    if 2 * right <= len(DOCUMENTS):
        raise CheckError(f"{found}: the weights were not read rightly")
    return found


def vision(text_folder: Path, folder: Path, fit: tower.Fit) -> str:
    """Check the vision checkpoint against the text checkpoint; returns what was found, in words.

    Raises:
        CheckError: for a cell that is read as another token, or an answer that is not that to the same text.
    """
    if fit.nearest_right < 1:
        raise CheckError(f"{fit.nearest_right:.4f} of {fit.cells} cells are read rightly, expected all")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    llama = LlamaForCausalLM.from_pretrained(text_folder, dtype=torch.float32)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for document in _documents():
        question = document.questions[0]
        # The frame of an image is a newline before and after it; the text gets the same.
        wanted = _answer(llama, tokenizer, f"\n{document.text}\n\n{question.text}", question.opening)
        lines = cells.draw_text(document.text, tokenizer)
        prompt = prompt_of(tokenizer, f"{SLOT * len(lines)}\n{question.text}", question.opening)
        inputs = processor(text=[prompt], images=lines, return_tensors="pt")
        got = _greedy(model, tokenizer, **inputs)
        if got != wanted:
            raise CheckError(f"{document.task} {document.seed}: the text is answered {wanted!r}, its images {got!r}")
    return (
        f"{fit.cells} tokens readable, relative error of their embeddings {fit.mean_error:.4f} (largest "
        f"{fit.max_error:.4f}), {len(DOCUMENTS)} of {len(DOCUMENTS)} answers are those to the same text"
    )


def prompt_of(tokenizer: PreTrainedTokenizerBase, user: str, opening: str) -> str:
    """A prompt with the user's message and the beginning of the assistant's."""
    messages = [{"role": "user", "content": user}]
    head: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return head + opening


def _documents() -> Iterator[reading.Document]:
    return (reading.make_document(*which) for which in DOCUMENTS)


def _answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, user: str, opening: str) -> str:
    ids = tokenizer.encode(prompt_of(tokenizer, user, opening), add_special_tokens=False)
    return _greedy(model, tokenizer, input_ids=torch.tensor([ids]))


def _greedy(model: GenerationMixin, tokenizer: PreTrainedTokenizerBase, **inputs: Tensor) -> str:
    """The first ANSWER_TOKENS tokens of the continuation, as text."""
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    out = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    return text
