"""The stock model with its attention in reach: read what a prompt attended to, decode from part of its cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlcache_sgl.evaluation.tasks.receipts import Question, Receipt

THRESHOLD = 0.01
"""VL-Cache, equation 1: an entry counts as attended from this share of its row's maximum."""
MAX_ANSWER_TOKENS = 8
"""Tokens after which decoding gives up; a right answer has four and the end of the turn."""


@dataclass(frozen=True)
class LayerAttention:
    """What one layer attended to in prefill; sums over rows, means over heads, float32 `[prompt]`."""

    post_vision: Tensor
    """Rows after the image."""
    accumulated: Tensor
    """All rows."""
    last: Tensor
    """The last row."""
    density: float
    """Share of the post-vision rows' causal entries above THRESHOLD (VL-Cache, equation 2)."""


@dataclass(frozen=True)
class Prompt:
    """A question after its prefill."""

    tokens: int
    image: slice
    """Positions of the image tokens."""
    layers: list[LayerAttention]
    first_row: Tensor
    """`[layers, tokens]` float32: attention of the first decoded token over the prompt, mean over heads."""
    answer: list[int]
    """Greedy answer from the full cache, with the end of the turn."""
    expected: list[int]
    """The right one."""
    _cache: Any
    _next_position: int

    @property
    def right(self) -> bool:
        return self.answer == self.expected


class Probe:
    """A checkpoint folder, loaded with transformers in float32."""

    def __init__(self, folder: Path) -> None:
        attention = f"receipts_probe_{id(self)}"  # transformers' registry is global: a name for each probe
        AttentionInterface.register(attention, self._attend)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        ).eval()
        config = self.model.config
        self.layers = config.text_config.num_hidden_layers
        self.end = config.text_config.eos_token_id
        self._recording: list[Tensor] | None = None
        self._keep: Tensor | None = None
        """`[sets, layers, prompt]` bool, one row of the batch per set."""

    @torch.no_grad()
    def right(self, receipt: Receipt, question: Question) -> bool:
        """Whether the full cache gives exactly the answer: one stock forward over prompt and answer."""
        inputs, expected = self._inputs(receipt, question)
        # Greedy decoding is right exactly if, given the right answer, every token of it was the first choice.
        answer = torch.tensor([expected[:-1]])
        for key, tail in (("input_ids", answer), *((k, v) for k, v in _alike(inputs, answer) if k in inputs)):
            inputs[key] = torch.cat([inputs[key], tail], 1)
        logits = self.model(**inputs).logits[0, -len(expected) :]
        return bool(logits.argmax(-1).tolist() == expected)

    @torch.no_grad()
    def prefill(self, receipt: Receipt, question: Question) -> Prompt:
        """Run the prompt, record its attention, and decode the answer from the full cache."""
        inputs, expected = self._inputs(receipt, question)
        ids = inputs["input_ids"][0]
        image = (ids == self.model.config.image_token_id).nonzero().flatten()
        span = slice(int(image[0]), int(image[-1]) + 1)
        with self._record() as seen:
            out = self.model(**inputs, use_cache=True)
            layers = [_summary(weights, span.stop) for weights in seen]
        prompt = Prompt(
            tokens=len(ids),
            image=span,
            layers=layers,
            first_row=torch.empty(0),
            answer=[],
            expected=expected,
            _cache=out.past_key_values,
            _next_position=len(ids) + int(self.model.model.rope_deltas),
        )
        answer = [int(out.logits[0, -1].argmax())]
        with self._record() as seen:
            self._decode(prompt, answer, None)
            first_row = torch.stack([weights[0, :, 0, : len(ids)].mean(0) for weights in seen])
        while answer[-1] != self.end and len(answer) < MAX_ANSWER_TOKENS:
            answer.append(int(self._decode(prompt, answer, None)[0, -1]))
        return Prompt(**{**vars(prompt), "answer": answer, "first_row": first_row})

    @torch.no_grad()
    def same_answers(self, prompt: Prompt, keep: Tensor) -> list[bool]:
        """Whether decoding from each kept set gives the full cache's answer.

        `keep` `[sets, layers, tokens]` bool.  The first token comes from prefill, as in VL-Cache, so it never differs.
        """
        choices = self._decode(prompt, prompt.answer[:-1], keep)
        return (choices == torch.tensor(prompt.answer[1:])).all(-1).tolist()

    def _decode(self, prompt: Prompt, tokens: list[int], keep: Tensor | None) -> Tensor:
        """First choices `[sets, len(tokens)]` after each of `tokens`; leaves the prompt's cache as it was."""
        sets = 1 if keep is None else len(keep)
        cache = copy.deepcopy(prompt._cache)
        cache.batch_repeat_interleave(sets)
        positions = prompt._next_position + torch.arange(len(tokens))
        self._keep = keep
        try:
            out = self.model(
                input_ids=torch.tensor([tokens]).expand(sets, -1),
                past_key_values=cache,
                position_ids=positions.expand(3, sets, -1),
                cache_position=torch.arange(prompt.tokens, prompt.tokens + len(tokens)),
                attention_mask=torch.ones(sets, prompt.tokens + len(tokens), dtype=torch.long),
                use_cache=True,
            )
        finally:
            self._keep = None
        return out.logits.argmax(-1)

    def _inputs(self, receipt: Receipt, question: Question) -> tuple[dict[str, Any], list[int]]:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        turn = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(text=[text], images=[receipt.image], return_tensors="pt")
        return dict(inputs), [*self.processor.tokenizer(question.answer)["input_ids"], self.end]

    @contextmanager
    def _record(self) -> Iterator[list[Tensor]]:
        self._recording = []
        try:
            yield self._recording
        finally:
            self._recording = None

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **other: Any
    ) -> tuple[Tensor, None]:
        """Stock attention for the vision tower and for prefill that nobody records, the same written out otherwise."""
        prefill = query.shape[2] == key.shape[2]
        if not hasattr(module, "layer_idx") or (prefill and self._recording is None):
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **other)
        groups = module.num_key_value_groups
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = (query @ key.transpose(2, 3) * scaling).float()
        rows, keys = logits.shape[-2:]
        visible = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)[None, None]
        if self._keep is not None:
            kept = self._seen(module.layer_idx, query * scaling)
            decoded = torch.ones(*kept.shape[:2], keys - kept.shape[2], dtype=torch.bool)
            visible = visible & torch.cat([kept, decoded], 2)[:, None]
        weights = torch.softmax(logits.masked_fill(~visible, float("-inf")), -1)
        if self._recording is not None:
            self._recording.append(weights)
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None

    def _seen(self, layer: int, rows: Tensor) -> Tensor:
        """`[sets, 1 or rows, prompt]` bool, what rows, `[sets, heads, rows, head_dim]` times the scale, see of it."""
        assert self._keep is not None
        return self._keep[:, layer, None]


def _alike(inputs: dict[str, Any], answer: Tensor) -> list[tuple[str, Tensor]]:
    """Per-token inputs besides the ids, for tokens of text."""
    return [("attention_mask", torch.ones_like(answer)), ("mm_token_type_ids", torch.zeros_like(answer))]


def _summary(weights: Tensor, image_end: int) -> LayerAttention:
    """`weights` `[1, heads, prompt, prompt]`."""
    rows = weights[0, :, image_end:]
    attended = (rows >= THRESHOLD * rows.amax(-1, keepdim=True)).float().sum((1, 2))
    causal = sum(range(image_end + 1, weights.shape[-1] + 1))
    return LayerAttention(
        post_vision=rows.sum(1).mean(0),
        accumulated=weights[0].sum(1).mean(0),
        last=weights[0, :, -1].mean(0),
        density=float((attended / causal).mean()),
    )
