"""Records how NVIDIA/kvpress answers on a real model, so that our policies can be compared without installing it.

Run in an environment that has kvpress (with torch and transformers), on the checkpoint of `make real-model`::

    python -m benchmarks.judge.crosscheck prompts    # ours: writes out/judge/prompts.json
    uv venv oracle && uv pip install --python oracle/bin/python kvpress==0.5.5
    oracle/bin/python tests/oracles/record_kvpress_smollm2.py out/smollm2/text out/judge/prompts.json

Writes two files beside this one.  ``kvpress_smollm2.json``: per prompt, method and kept share whether the right answer
follows and its log-probability.  Each prompt is read once; every press compresses what attention saw there, and the
answer's tokens are run over the compressed cache, at their own positions.  KVzip reads the text without the question,
as its authors do.  ``kvpress_smollm2.npz``: the states of one layer for the beginning of a prompt, rounded to float16,
and what each press keeps of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from kvpress import (
    CompactorPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, repeat_kv

HERE = Path(__file__).parent
PRESSES: dict[str, Callable[[float], Any]] = {
    "keydiff": KeyDiffPress,
    "snapkv": SnapKVPress,
    "expected_attention": ExpectedAttentionPress,
    "observed_attention": ObservedAttentionPress,
    "streaming_llm": StreamingLLMPress,
    "tova": TOVAPress,
    "knorm": KnormPress,
    "compactor": CompactorPress,
    "compactor blending 0.35": partial(CompactorPress, blending=0.35),
}
"""By name; the argument is the share that goes."""
KVZIP = "kvzip"
SHARES = (0.5, 0.3, 0.1)
LAYER = 18
"""Of the recorded states: the one that retrieves."""
TOKENS = 128
"""Of the recorded states."""
CHUNK = 58
"""Of Compactor's look-ahead there: two whole chunks between its ends, because padding of the last one has weight."""


class Seen:
    """What every attention layer was given, and gave, in one forward."""

    def __init__(self, model: PreTrainedModel, tokens: list[int]) -> None:
        self.layers: dict[int, tuple[Any, torch.Tensor, torch.Tensor, dict[str, Any]]] = {}
        hooks = [layer.self_attn.register_forward_hook(self._see, with_kwargs=True) for layer in model.model.layers]
        self.cache = DynamicCache()
        model.set_attn_implementation("eager")  # gives the attention that ObservedAttention counts
        self.logits = model(torch.tensor([tokens]), past_key_values=self.cache).logits[0, -1]
        model.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()

    def _see(self, module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.layers[module.layer_idx] = (module, kwargs["hidden_states"], output[1], kwargs)

    def compressed(self, press: Any) -> DynamicCache:
        cache = DynamicCache()
        for index, (module, hidden, attention, kwargs) in self.layers.items():
            layer = self.cache.layers[index]
            cache.update(*press.compress(module, hidden, layer.keys, layer.values, attention, kwargs), index)
        return cache


def main(model_folder: str, prompts_path: str) -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # some presses look for it there
    prompts = json.loads(Path(prompts_path).read_text())
    check_against_the_context_manager(model, prompts["prompts"][0])
    record_states(model, prompts["prompts"][0]["tokens"][:TOKENS])
    recorded = []
    for prompt in prompts["prompts"]:
        recorded.append({"case": prompt["case"], "digest": prompt["digest"], "found": answers(model, prompt)})
        print(prompt["case"], recorded[-1]["found"], flush=True)
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    head = {"versions": versions, "weights": prompts["weights"], "shares": SHARES}
    lines = ",\n".join("  " + json.dumps(item) for item in recorded)
    text = json.dumps(head)[:-1] + ',\n "prompts": [\n' + lines + "\n ]}\n"
    (HERE / "kvpress_smollm2.json").write_text(text)


def answers(model: PreTrainedModel, prompt: dict[str, Any]) -> dict[str, list[float]]:
    """Right (1 or 0) and log-probability of the whole answer, by method and kept share."""
    tokens, answer = prompt["tokens"], prompt["answer"]
    seen = Seen(model, tokens)
    begin = seen.logits.log_softmax(-1)
    first = int(begin.argmax()) == answer[0], float(begin[answer[0]])
    found = {
        "full": joined(first, follow(model, seen.compressed(KnormPress(0.0)), len(tokens), answer[:-1], answer[1:]))
    }
    for name, make in PRESSES.items():
        for share in SHARES:
            torch.manual_seed(0)
            cache = seen.compressed(make(1 - share))
            found[f"{name}@{share}"] = joined(first, follow(model, cache, len(tokens), answer[:-1], answer[1:]))
    text, rest = tokens[: prompt["text"]], [*tokens[prompt["text"] :], *answer[:-1]]
    for share in SHARES:
        cache = DynamicCache()
        with KVzipPress(1 - share)(model):
            model.model(input_ids=torch.tensor([text]), past_key_values=cache)
        right, gained = follow(model, cache, len(text), rest, answer)
        found[f"{KVZIP}@{share}"] = [int(right), round(gained, 4)]
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
    return found


def follow(
    model: PreTrainedModel, cache: DynamicCache, begin: int, tokens: list[int], answer: list[int]
) -> tuple[bool, float]:
    """`tokens` at positions from `begin` on, over `cache`; the last of them predict `answer`."""
    positions = torch.arange(begin, begin + len(tokens))[None]
    logits = model(torch.tensor([tokens]), past_key_values=cache, position_ids=positions).logits[0, -len(answer) :]
    log = logits.log_softmax(-1)
    return log.argmax(-1).tolist() == answer, float(log[range(len(answer)), answer].sum())


def joined(first: tuple[bool, float], rest: tuple[bool, float]) -> list[float]:
    return [int(first[0] and rest[0]), round(first[1] + rest[1], 4)]


def check_against_the_context_manager(model: PreTrainedModel, prompt: dict[str, Any]) -> None:
    """`Seen.compressed` leaves what a press leaves that is used as kvpress documents it."""
    seen = Seen(model, prompt["tokens"])
    for name, make in PRESSES.items():
        torch.manual_seed(0)
        ours = seen.compressed(make(0.5))
        model.set_attn_implementation("eager")
        torch.manual_seed(0)
        cache = DynamicCache()
        with make(0.5)(model):
            model.model(input_ids=torch.tensor([prompt["tokens"]]), past_key_values=cache)
        model.set_attn_implementation("sdpa")
        for mine, theirs in zip(ours.layers, cache.layers, strict=True):
            if not torch.equal(mine.keys, theirs.keys):
                raise SystemExit(f"{name}: compressing seen states is not what its context manager does")


def record_states(model: PreTrainedModel, tokens: list[int]) -> None:
    """Real queries, keys and values before their rotation, and which positions each press keeps of them."""
    config = model.config
    module, hidden, _, _ = Seen(model, tokens).layers[LAYER]
    names = ("q_proj", "k_proj", "v_proj")
    parts = [
        getattr(module, name)(hidden).unflatten(-1, (-1, config.head_dim)).transpose(1, 2).half() for name in names
    ]
    q_pre, k_pre, values = (part[0].numpy() for part in parts)
    np.savez_compressed(
        HERE / "kvpress_smollm2.npz",
        versions=f"kvpress {version('kvpress')}, transformers {version('transformers')}, torch {torch.__version__}",
        theta=config.rope_parameters["rope_theta"],
        q_pre=q_pre,
        k_pre=k_pre,
        values=values,
        **kept_of(config, *(part.float() for part in parts)),
    )


def kept_of(config: Any, q_pre: torch.Tensor, k_pre: torch.Tensor, values: torch.Tensor) -> dict[str, np.ndarray]:
    """`[K, kept]` ascending positions by press and share, from a stand-in that has these states."""
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    width, dim, count = heads * config.head_dim, config.head_dim, q_pre.shape[2]
    rotary = LlamaRotaryEmbedding(config)
    embeddings = rotary(values, torch.arange(count)[None])
    queries, keys = apply_rotary_pos_emb(q_pre, k_pre, *embeddings)
    stand_in = SimpleNamespace(
        config=config,
        head_dim=dim,
        layer_idx=LAYER,
        q_proj=lambda hidden: hidden[..., :width],
        k_proj=lambda hidden: hidden[..., width:],
        rotary_emb=rotary,
    )
    hidden = torch.cat([q_pre, k_pre], dim=1).transpose(1, 2).flatten(2)
    logits = queries @ repeat_kv(keys, groups).transpose(2, 3) / dim**0.5
    attention = logits.masked_fill(~torch.ones(count, count).tril().bool(), -torch.inf).softmax(-1)
    given = (stand_in, hidden, keys, values, attention, {"position_embeddings": embeddings})
    sketch = torch.from_numpy(np.load(HERE / "kvpress.npz")["sketch"])  # one for all heads, as ours is
    found = {}
    presses = {name: make for name, make in PRESSES.items() if "compactor" not in name}
    presses["compactor"] = partial(CompactorPress, blending=0.35, chunk_size=CHUNK)
    with mock.patch("torch.randn", lambda *shape, **_: sketch.expand(shape)):
        for name, make in presses.items():
            for share in SHARES:
                kept, _ = make(1 - share).compress(*given)
                same = (kept[0][:, :, None] == keys[0][:, None]).all(-1)  # keys tell which tokens are left
                found[f"{name}@{share}"] = same.int().argmax(-1).sort(-1).values.numpy().astype(np.int16)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
