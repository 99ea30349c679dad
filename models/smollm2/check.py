"""What a checkpoint must be able to do before it is used: the checks of the build, with transformers on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
)

from vlcache_sgl.tasks import cells, reading

from . import tower

KNOWN = (("What is the capital of France?", "Paris"), ("What colour is the sky on a clear day?", "blue"))
"""Questions that the language model answers rightly if its weights were read rightly."""
ROUND_TRIPS = ("The code of the blue lamp is 7391.\nHello  world, it's naïve! 12.5", "日本 🙂\t\n\n x")
DOCUMENTS = tuple(("needle", 200, reading.FIRST_DEVELOPMENT_SEED + number) for number in range(3))
"""Task, size and seed of texts that both checkpoints read."""
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
    for question, known in KNOWN:
        prompt = torch.tensor([_encode(tokenizer, prompt_of(tokenizer, question, ""))])
        answer = tokenizer.decode(_greedy(model, prompt, 2 * ANSWER_TOKENS, input_ids=prompt))
        if known not in answer:
            raise CheckError(
                f"{question!r} is answered {answer!r}, without {known!r}: the weights were not read rightly"
            )
    return f"{len(KNOWN)} of {len(KNOWN)} known answers"


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
    for task, size, seed in DOCUMENTS:
        document = reading.make_document(task, size, seed)
        question = document.questions[0]
        # The frame of an image is a newline before and after it; the text gets the same.
        read = prompt_of(tokenizer, f"\n{document.text}\n\n{question.text}", question.opening)
        prompt = torch.tensor([_encode(tokenizer, read)])
        wanted = tokenizer.decode(_greedy(llama, prompt, ANSWER_TOKENS, input_ids=prompt))
        lines = cells.draw_text(document.text, tokenizer)
        seen = prompt_of(tokenizer, f"{SLOT * len(lines)}\n{question.text}", question.opening)
        inputs = processor(text=[seen], images=lines, return_tensors="pt")
        if inputs["input_ids"].shape != prompt.shape:
            raise CheckError(f"{inputs['input_ids'].shape[1]} tokens with images, {prompt.shape[1]} as text")
        got = tokenizer.decode(_greedy(model, inputs["input_ids"], ANSWER_TOKENS, **inputs))
        if got != wanted:
            raise CheckError(f"{task} {seed}: the text is answered {wanted!r}, its images {got!r}")
    return (
        f"{fit.cells} tokens readable, relative error of their embeddings {fit.mean_error:.4f} (largest "
        f"{fit.max_error:.4f}), {len(DOCUMENTS)} of {len(DOCUMENTS)} answers are those to the same text"
    )


def prompt_of(tokenizer: PreTrainedTokenizerBase, user: str, opening: str) -> str:
    """A prompt with the user's message and the beginning of the assistant's."""
    messages = [{"role": "user", "content": user}]
    head: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return head + opening


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    return ids


def _greedy(model: torch.nn.Module, prompt: Tensor, tokens: int, **inputs: Tensor) -> list[int]:
    out: list[int] = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, prompt.shape[1] :].tolist()
    return out
