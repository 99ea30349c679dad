"""The bundled model in transformers with its attention in reach: questions on a picture of which some is hidden."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlcache_sgl.evaluation.tasks.receipts import Picture, Question
from vlcache_sgl.sglang_hooks.rotary import ModelRotary

MODEL = "models/tinyvlm/grounded"


class Seen(NamedTuple):
    """One layer of the last forward: `B` questions of `t` rows each, behind a prefix; `T` keys with the prefix."""

    queries: Tensor
    """`[B, t, H, D]`, times the factor of the logits."""
    keys: Tensor
    """`[B, T, K, D]`."""
    values: Tensor
    """`[B, T, K, D]`."""
    weights: Tensor
    """`[B, H, t, T]`."""
    lse: Tensor
    """`[B, H, t]`: logarithm of the sum of exponentials over what a row sees."""


class Recorder:
    """Looks at a picture once, then answers questions from all or part of what it has kept of it.

    The prefix is the prompt up to the end of the picture; questions are its rows behind it, as on a server after a hit.

    Args:
        model: one of the bundled ones.
    """

    def __init__(self, model: str = MODEL) -> None:
        from transformers import AttentionInterface, AutoProcessor, Qwen2_5_VLForConditionalGeneration
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self._stock = sdpa_attention_forward
        name = f"sharing_recorder_{id(self)}"
        AttentionInterface.register(name, self._attend)
        self._processor = AutoProcessor.from_pretrained(model)
        self._model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model, dtype=torch.float32, attn_implementation=name
        ).eval()
        self._keep: Tensor | None = None
        self._cache: Any = None
        self._next = 0
        self._tails: dict[str, list[int]] = {}
        text = self._model.config.text_config
        self._end: int = text.eos_token_id
        self.layers: int = text.num_hidden_layers
        self.scale = (text.hidden_size // text.num_attention_heads) ** -0.5
        """Factor of the logits."""
        self.rotary = self._rotary(text.max_position_embeddings)
        self.span = slice(0, 0)
        """The picture's positions; the prefix ends where it does."""
        self.positions = torch.empty(3, 0, dtype=torch.long)
        """`[3, prefix]`, rotary positions."""
        self.seen: list[Seen] = []
        """Per layer."""

    @torch.no_grad()
    def look_at(self, picture: Picture) -> None:
        """Run the prefix."""
        inputs = self._inputs(picture, "")
        image = (inputs["input_ids"][0] == self._model.config.image_token_id).nonzero().flatten()
        self.span = slice(int(image[0]), int(image[-1]) + 1)
        whole = inputs["input_ids"].shape[1]
        for name, value in inputs.items():
            if value.dim() == 2 and value.shape[1] == whole:
                inputs[name] = value[:, : self.span.stop]
        positions, shift = self._model.model.get_rope_index(**inputs)
        self._picture, self._keep = picture, None
        self.seen = []
        out = self._model(**inputs, position_ids=positions, use_cache=True)
        self._cache = out.past_key_values
        self.positions = positions[:, 0]
        self._next = self.span.stop + int(shift)

    def tokens(self, text: str) -> list[int]:
        """What follows the picture, whichever it is, in the prompt of the question `text`."""
        if text not in self._tails:
            ids = self._inputs(self._picture, text)["input_ids"][0]
            self._tails[text] = ids[self.span.stop :].tolist()
        return self._tails[text]

    def answer_tokens(self, question: Question) -> list[int]:
        """The right answer with the end of the turn."""
        return [*self._processor.tokenizer(question.answer)["input_ids"], self._end]

    @torch.no_grad()
    def ask(self, rows: Sequence[Sequence[int]], keep: Tensor | None = None) -> Tensor:
        """Run token rows behind the prefix, side by side.

        Args:
            rows: `B` lists of tokens.
            keep: `[B, layers, prefix]` bool, what they see of the prefix; None = all.

        Returns:
            `[B, longest]` int64: the first choice after each token; what stands behind a row's end means nothing.
        """
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[self._end] * (longest - len(row))] for row in rows])
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(rows))
        positions = self._next + torch.arange(longest)
        self._keep, self.seen = keep, []
        out = self._model(
            input_ids=ids,
            past_key_values=cache,
            position_ids=positions.expand(3, len(rows), -1),
            cache_position=torch.arange(self.span.stop, self.span.stop + longest),
            attention_mask=torch.ones(len(rows), self.span.stop + longest, dtype=torch.long),
            use_cache=True,
        )
        choices: Tensor = out.logits.argmax(-1)
        return choices

    def right(self, questions: Sequence[Question], keep: Tensor) -> list[bool]:
        """Whether greedy decoding gives exactly the answers.

        It does if, given the right answer, every token of it is the first choice.
        """
        prompts, answers = [self.tokens(q.text) for q in questions], [self.answer_tokens(q) for q in questions]
        choices = self.ask([[*p, *a[:-1]] for p, a in zip(prompts, answers, strict=True)], keep)
        return [
            choices[i, len(prompt) - 1 : len(prompt) - 1 + len(answer)].tolist() == answer
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]

    @torch.no_grad()
    def _rotary(self, positions: int) -> ModelRotary:
        """The language model's rotary embedding as policies see it, good for that many positions."""
        embedding = self._model.model.language_model.rotary_emb
        both = embedding(torch.zeros(()), torch.arange(positions).expand(3, 1, -1))
        cache = torch.cat([part[0].chunk(2, -1)[0] for part in both], -1)  # each has its half twice
        return ModelRotary(
            SimpleNamespace(cos_sin_cache=cache, is_neox_style=True, mrope_section=embedding.mrope_section)
        )

    def _inputs(self, picture: Picture, text: str) -> dict[str, Tensor]:
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = self._processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return dict(self._processor(text=[prompt], images=[picture.image], return_tensors="pt"))

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **other: Any
    ) -> tuple[Tensor, None]:
        """Stock attention for the vision tower, the same written out for the language model."""
        if not hasattr(module, "layer_idx"):
            stock: tuple[Tensor, None] = self._stock(
                module, query, key, value, attention_mask, scaling=scaling, **other
            )
            return stock
        groups, rows, tokens = module.num_key_value_groups, query.shape[2], key.shape[2]
        visible = torch.ones(query.shape[0], rows, tokens, dtype=torch.bool).tril(tokens - rows)
        if self._keep is not None:
            visible[..., : self.span.stop] &= self._keep[:, module.layer_idx, None]
        logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
        logits = logits.masked_fill(~visible[:, None], -math.inf)
        lse = logits.logsumexp(-1)
        weights = (logits - lse[..., None]).exp()
        turned = (query.transpose(1, 2) * scaling, key.transpose(1, 2), value.transpose(1, 2))
        self.seen.append(Seen(*turned, weights, lse))
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None
