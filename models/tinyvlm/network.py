"""The stock model's weights behind a faster forward for training: bf16, many questions per image, attention in reach.

Questions about one image cannot see each other, so they share its keys and values: the sequence is the prefix, the
image tokens, then K branches, each a question with its answer.  `tests/models/test_tinyvlm.py` compares the result with
the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from vlcache_sgl.evaluation.tasks.receipts import CODE_LENGTH, NUM_GLYPHS

from . import losses
from .batches import ANSWER_TOKENS, PATCHES_PER_CELL, Batch, Vocabulary
from .schedule import BOOTSTRAP

TEXT_LAYERS = 2
"""Layers below this find the label in the question; the others find the record in the image."""
MAX_SIDE = 32
"""Of an image, in cells."""
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Layout:
    """Where everything is in a packed sequence of one shape."""

    prompt: int
    """Tokens before the branches: prefix and image."""
    tail: int
    """Tokens of a question, from the end of the image to the end of the prompt."""
    branch: int
    """Tokens of a branch: tail and code."""
    cos: Tensor
    sin: Tensor
    """`[sequence, 1, head_dim]`: M-RoPE angles."""
    mask: Tensor
    """`[K * branch, sequence]` bool, True where a branch's rows may look."""
    answer_rows: Tensor
    """`[K * ANSWER_TOKENS]` rows of the branches that predict an answer token."""


@dataclass
class Observed:
    """What `forward` saw in the attention of the observed questions; losses are means over the layers they concern."""

    grounding: Tensor | float = 0.0
    ranking: Tensor | float = 0.0
    density: Tensor | float = 0.0
    layer_densities: list[float] = field(default_factory=list)


class TrainableVLM:
    """Qwen2.5-VL as in transformers, for training on receipts.  Weights are the stock model's own, in float32."""

    def __init__(
        self, model: Qwen2_5_VLForConditionalGeneration, vocabulary: Vocabulary, compiled: bool = True
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        text = model.config.text_config
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = text.hidden_size // text.num_attention_heads
        self.layers = text.num_hidden_layers
        self._layouts: dict[tuple[int, int, int, int], Layout] = {}
        compiler: Callable[..., Callable[..., Tensor]] = torch.compile if compiled else (lambda f, **_: f)
        self._before = compiler(_before_attention, dynamic=True)
        self._after = compiler(_after_attention, dynamic=True)

    # -- images ----------------------------------------------------------------------------------------------------

    def embed_glyphs(self, bank: Tensor, variants: int) -> Tensor:
        """Image embeddings of `variants` random drawings of every glyph: `[NUM_GLYPHS * variants, hidden]`.

        A window of the vision tower is one cell, so a drawing is embedded once and used all over the batch.
        """
        pick = torch.stack([torch.randperm(bank.shape[1])[:variants] for _ in range(NUM_GLYPHS)])
        pixels = bank[torch.arange(NUM_GLYPHS)[:, None], pick].reshape(NUM_GLYPHS * variants, PATCHES_PER_CELL, -1)
        return self._embed_cells(pixels, torch.randint(0, MAX_SIDE, (len(pixels), 2)))

    def embed_images(self, batch: Batch, bank: Tensor, variants: int) -> Tensor:
        """`[B, image tokens, hidden]`."""
        glyphs = self.embed_glyphs(bank, variants)
        return F.embedding(batch.glyphs * variants + torch.randint(0, variants, batch.glyphs.shape), glyphs)

    def _embed_cells(self, pixels: Tensor, cells: Tensor) -> Tensor:
        """Vision tower and merger on `[N, 4, values]` patches of cells at `[N, 2]` (row, col)."""
        tower = self.model.model.visual
        heads = self.model.config.vision_config.num_heads
        # An image is a film of two equal frames to the patch embedding: add up its two frames' weights.
        weight = tower.patch_embed.proj.weight.sum(2).flatten(1)
        x = F.linear(pixels.to(BF16), weight.to(BF16))
        dim = x.shape[-1] // heads
        frequencies = 1 / (10000 ** (torch.arange(0, dim // 2, 2).float() / (dim // 2)))
        patches = 2 * cells[:, None] + torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        angles = (patches[..., None] * frequencies).flatten(2)
        if torch.rand(()) < 0.7:  # Serving engines differ in this precision (SGLang: bf16); the model should not care.
            angles = angles.to(BF16).float()
        angles = torch.cat([angles, angles], -1)[:, :, None]
        cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)
        for block in tower.blocks:
            h = _rms_norm(x, block.norm1.weight)
            q, k, v = _linear(h, block.attn.qkv).view(len(x), PATCHES_PER_CELL, 3, heads, dim).unbind(2)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            x = x + _linear(o.transpose(1, 2).flatten(2), block.attn.proj)
            h = _rms_norm(x, block.norm2.weight)
            gated = F.silu(_linear(h, block.mlp.gate_proj)) * _linear(h, block.mlp.up_proj)
            x = x + _linear(gated, block.mlp.down_proj)
        x = _rms_norm(x, tower.merger.ln_q.weight).flatten(1)
        return _linear(F.gelu(_linear(x, tower.merger.mlp[0])), tower.merger.mlp[2])

    # -- language ----------------------------------------------------------------------------------------------------

    def forward(
        self, batch: Batch, cells: Tensor, observe: int = 0, cache: losses.CacheDraw | None = None
    ) -> tuple[Tensor, Observed]:
        """Logits `[B, K, ANSWER_TOKENS, vocabulary]` float32 for `cells` from `embed_images`.

        The attention of the first `observe` questions is looked at; with `cache`, their answers after the first
        character are decoded from what `cache` keeps.
        """
        images, questions, _ = batch.text.shape
        layout = self._layout(batch)
        language = self.model.model.language_model
        table = language.embed_tokens.weight
        observed = Observed()
        prefix = F.embedding(self.vocabulary.prefix, table).to(BF16).expand(images, -1, -1)
        text = F.embedding(batch.text.flatten(1), table).to(BF16)
        x = torch.cat([prefix, cells.to(BF16), text], 1)
        for index, layer in enumerate(language.layers):
            a = layer.self_attn
            q, k, v = self._before(
                x,
                layer.input_layernorm.weight,
                *(t for proj in (a.q_proj, a.k_proj, a.v_proj) for t in (proj.weight, proj.bias)),
                layout.cos,
                layout.sin,
            )
            mask = layout.mask
            if observe:
                mask = self._observe(index, batch, layout, q, k, observe, cache, observed)
            out = self._attend(q[:, layout.prompt :], k, v, mask=mask)
            if index == self.layers - 1:
                x = x[:, layout.prompt :]
            else:
                n = layout.prompt
                out = torch.cat([self._attend(q[:, :n], k[:, :n], v[:, :n]), out], 1)
            x = self._after(
                x,
                out.flatten(2),
                a.o_proj.weight,
                layer.post_attention_layernorm.weight,
                layer.mlp.gate_proj.weight,
                layer.mlp.up_proj.weight,
                layer.mlp.down_proj.weight,
            )
        x = _rms_norm(x[:, layout.answer_rows], language.norm.weight)
        logits = F.linear(x, self.model.lm_head.weight.to(BF16)).float()
        return logits.view(images, questions, ANSWER_TOKENS, -1), observed

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        group = self.heads // self.kv_heads
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        bias = None if mask is None else torch.zeros(mask.shape, dtype=BF16).masked_fill(~mask, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=mask is None).transpose(1, 2)

    def _observe(
        self,
        index: int,
        batch: Batch,
        layout: Layout,
        q: Tensor,
        k: Tensor,
        observe: int,
        cache: losses.CacheDraw | None,
        observed: Observed,
    ) -> Tensor:
        """Add layer `index` to `observed`; returns the mask of the branches' rows, compressed if `cache` says so."""
        attention = self._post_vision(layout, q, k, batch.text.shape[1], observe)
        words = self.vocabulary.label_words[batch.template]
        in_text = index < TEXT_LAYERS
        record = batch.record[:, :observe]
        label = (torch.tensor(words) + layout.prompt).expand(*record.shape[:2], -1)
        rows = self.vocabulary.grounded_rows[batch.template]
        targets = label if in_text else record
        observed.grounding = observed.grounding + losses.grounding(attention, rows, targets) / self.layers
        if not in_text:
            found = losses.ranking(attention.scores, record)
            observed.ranking = observed.ranking + found / (self.layers - TEXT_LAYERS)
        observed.density = observed.density + losses.excess_density(attention) / self.layers
        with torch.no_grad():
            observed.layer_densities.append(losses.density(attention).item())
            if cache is None:
                return layout.mask
            return self._compressed_mask(layout, cache.keep(index, attention, None if in_text else record), batch)

    def _post_vision(self, layout: Layout, q: Tensor, k: Tensor, questions: int, observe: int) -> losses.PostVision:
        """Attention of the first `observe` questions' own rows over the prompt and themselves."""
        n, rows = layout.prompt, layout.tail
        branches = (q.shape[0], questions, layout.branch, self.kv_heads)
        asked = q[:, n:].view(*branches, -1, self.head_dim)[:, :observe, :rows] * self.head_dim**-0.5
        own = k[:, n:].view(*branches, self.head_dim)[:, :observe, :rows]
        to_prompt = torch.einsum("bktgnd,bpgd->bgnktp", asked, k[:, :n]).float()
        to_itself = torch.einsum("bktgnd,bksgd->bgnkts", asked, own).float()
        future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
        to_itself = to_itself.masked_fill(future, float("-inf"))
        return losses.PostVision.of(torch.cat([to_prompt, to_itself], -1).flatten(1, 2))

    @staticmethod
    def _compressed_mask(layout: Layout, kept: Tensor, batch: Batch) -> Tensor:
        """The layout's mask, `[B, 1, K * branch, sequence]`, with the answer rows of the observed questions looking at
        `kept` `[B, observe, prompt + tail]` only."""
        images, questions, _ = batch.text.shape
        n, tail, branch = layout.prompt, layout.tail, layout.branch
        mask = layout.mask.view(1, questions, branch, -1).repeat(images, 1, 1, 1)
        for j in range(kept.shape[1]):
            mask[:, j, tail:, :n] &= kept[:, j, None, :n]
            mask[:, j, tail:, n + j * branch : n + j * branch + tail] &= kept[:, j, None, n:]
        return mask.view(images, 1, questions * branch, -1)

    def _layout(self, batch: Batch) -> Layout:
        questions, branch = batch.text.shape[1:]
        key = (batch.rows, batch.cols, questions, batch.template)
        if key not in self._layouts:
            first = len(self.vocabulary.prefix)
            prompt, tail = first + batch.rows * batch.cols, branch - CODE_LENGTH
            position = torch.arange(first).repeat(3, 1)
            row = torch.arange(batch.rows).repeat_interleave(batch.cols)
            col = torch.arange(batch.cols).repeat(batch.rows)
            image = first + torch.stack([torch.zeros_like(row), row, col])
            # Text goes on after the larger side of the image; every branch as if it were the only one.
            text = (first + max(batch.rows, batch.cols) + torch.arange(branch)).repeat(questions).repeat(3, 1)
            cos, sin = self._rope(torch.cat([position, image, text], 1))
            own = torch.ones(branch, branch, dtype=torch.bool).tril()
            mask = torch.cat(
                [torch.ones(questions * branch, prompt, dtype=torch.bool), torch.block_diag(*[own] * questions).bool()],
                1,
            )
            answers = torch.arange(questions)[:, None] * branch + tail - 1 + torch.arange(ANSWER_TOKENS)
            self._layouts[key] = Layout(prompt, tail, branch, cos, sin, mask, answers.flatten())
        return self._layouts[key]

    def _rope(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """M-RoPE cosines and sines of `[3, sequence]` (time, row, col) positions."""
        rope = self.model.config.text_config.rope_parameters
        dims = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        angles = position[:, :, None].float() / rope["rope_theta"] ** dims
        parts = angles.split(rope["mrope_section"], -1)
        angles = torch.cat([part[axis] for axis, part in enumerate(parts)], -1).repeat(1, 2)
        return angles.cos().to(BF16)[:, None], angles.sin().to(BF16)[:, None]


def can_observe(template: int) -> bool:
    """Whether the template is a real question; the bootstrap form has no rows to look at."""
    return template != BOOTSTRAP


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight.to(x.dtype)


def _linear(x: Tensor, module: torch.nn.Linear) -> Tensor:
    return F.linear(x, module.weight.to(x.dtype), None if module.bias is None else module.bias.to(x.dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _before_attention(
    x: Tensor,
    norm: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values: `[B, sequence, heads or kv_heads, head_dim]`."""
    h = _rms_norm(x, norm)

    def project(weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(h, weight.to(h.dtype), bias.to(h.dtype)).unflatten(-1, (-1, cos.shape[-1]))

    return (
        _rotate(project(q_weight, q_bias), cos, sin),
        _rotate(project(k_weight, k_bias), cos, sin),
        project(v_weight, v_bias),
    )


def _after_attention(
    x: Tensor, attended: Tensor, out: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    x = x + F.linear(attended, out.to(attended.dtype))
    h = _rms_norm(x, norm)
    h = F.silu(F.linear(h, gate.to(h.dtype))) * F.linear(h, up.to(h.dtype))
    return x + F.linear(h, down.to(h.dtype))
