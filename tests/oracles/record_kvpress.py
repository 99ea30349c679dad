"""Records what NVIDIA/kvpress says about one random layer, so that tests can compare without installing it.

Run in an environment that has kvpress (with torch and transformers; no model is downloaded)::

    uv venv oracle && uv pip install --python oracle/bin/python kvpress==0.5.5
    oracle/bin/python tests/oracles/record_kvpress.py

Writes ``kvpress.npz`` beside this file.  kvpress hooks into attention modules of transformers; the stand-in below has
what its scorers read of one: projections that cut queries and keys out of the hidden state, a config, a rotary
embedding.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from kvpress import (
    ChunkKVPress,
    CompactorPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    LeverageScorePress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, repeat_kv

HEADS, KV_HEADS, DIM = 4, 2, 64
TOKENS = 268
"""Two partitions of LagKV behind its sinks, and one whole chunk of Compactor between its ends."""
SKETCH = 48
LAYERS = 8


def main() -> None:
    random = np.random.RandomState(0)
    draw = lambda *shape: torch.from_numpy(random.standard_normal(shape).astype(np.float16)).float()[None]  # noqa: E731
    q_pre, k_pre, values = draw(HEADS, TOKENS, DIM), draw(KV_HEADS, TOKENS, DIM), draw(KV_HEADS, TOKENS, DIM)
    sketch = torch.from_numpy(random.standard_normal((DIM, SKETCH)).astype(np.float32))

    module = stand_in()
    embeddings = module.rotary_emb(values, torch.arange(TOKENS)[None])
    queries, keys = apply_rotary_pos_emb(q_pre, k_pre, *embeddings)
    hidden = torch.cat([q_pre, k_pre], dim=1).transpose(1, 2).flatten(2)
    given = (module, hidden, keys, values, None, {"position_embeddings": embeddings})

    def score(press: object) -> np.ndarray:
        with mock.patch("torch.randn", lambda *shape, **_: sketch.expand(shape)):
            return press.score(*given)[0].numpy()  # type: ignore[attr-defined]

    def kept(press: object) -> np.ndarray:
        """Positions, by compressing values that carry their own position."""
        numbered = torch.arange(TOKENS, dtype=torch.float32)[None, None, :, None].expand_as(values)
        return press.compress(*given[:3], numbered, *given[4:])[1][0, :, :, 0].sort(-1).values.long().numpy()  # type: ignore[attr-defined]

    logits = queries @ repeat_kv(keys, HEADS // KV_HEADS).transpose(2, 3) / DIM**0.5
    attentions = logits.masked_fill(~torch.ones(TOKENS, TOKENS).tril().bool(), -torch.inf).softmax(-1)

    np.savez_compressed(
        Path(__file__).with_name("kvpress.npz"),
        versions=f"kvpress {version('kvpress')}, transformers {version('transformers')}, torch {torch.__version__}",
        q_pre=q_pre[0].numpy().astype(np.float16),
        k_pre=k_pre[0].numpy().astype(np.float16),
        values=values[0].numpy().astype(np.float16),
        sketch=sketch.numpy(),
        rotated_keys=keys[0, :, -1].numpy(),
        snapkv=score(SnapKVPress(window_size=32, kernel_size=5)),
        tova=score(TOVAPress()),
        knorm=score(KnormPress()),
        keydiff=score(KeyDiffPress()),
        lagkv=score(LagKVPress(n_sink=4, lag_size=128)),
        expected_attention=score(ExpectedAttentionPress()),
        expected_attention_mean_only=score(ExpectedAttentionPress(use_covariance=False, use_vnorm=False)),
        observed_attention=ObservedAttentionPress().score(*given[:4], attentions, {})[0].numpy(),
        leverage=score(LeverageScorePress(sketch_dimension=SKETCH)),
        look_ahead=NonCausalAttnPress.non_causal_chunked_attn(
            queries[:, :, :256], repeat_kv(keys, HEADS // KV_HEADS)[:, :, :256], 128
        )[0].numpy(),
        compactor=score(CompactorPress(blending=0.35, sketch_dimension=SKETCH)),
        streaming_kept=kept(StreamingLLMPress(compression_ratio=0.8)),
        chunkkv_kept=kept(ChunkKVPress(SnapKVPress(compression_ratio=0.7, window_size=32))),
        pyramid_tokens=[
            PyramidKVPress(compression_ratio=0.75, window_size=4).get_layer_budget(stand_in(layer), 1000)
            for layer in range(LAYERS)
        ],
    )


def stand_in(layer: int = 0) -> SimpleNamespace:
    config = LlamaConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        num_hidden_layers=LAYERS,
        max_position_embeddings=4096,
    )
    return SimpleNamespace(
        config=config,
        head_dim=DIM,
        layer_idx=layer,
        q_proj=lambda hidden: hidden[..., : HEADS * DIM],
        k_proj=lambda hidden: hidden[..., HEADS * DIM :],
        rotary_emb=LlamaRotaryEmbedding(config),
    )


if __name__ == "__main__":
    main()
