"""The same language model behind `Qwen2_5_VLForConditionalGeneration`, with the solved tower: text read from images."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vlcache_sgl.evaluation.tasks.cells import CELL, MAX_CELLS

from . import tower

SPECIAL_TOKENS = {
    "<repo_name>": "<|vision_start|>",
    "<reponame>": "<|vision_end|>",
    "<file_sep>": "<|image_pad|>",
    "<filename>": "<|video_pad|>",
    "<gh_stars>": "<|vision_pad|>",
}
"""Special tokens that instructions never contain -> the names that Qwen's processor looks for."""
FRAME = "\n"
"""What the tokens around an image are to the language model: the end of a line."""


def write(text: Path, path: Path, texts: Iterable[str]) -> tower.Fit:
    """Write the checkpoint folder `path` from the text checkpoint; every token of `texts` is readable in images."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(text)
    llama = LlamaForCausalLM.from_pretrained(text, dtype=torch.float32)
    model = _model(llama, tokenizer)
    fit = tower.solve(model, tokenizer, tower.readable(tokenizer, texts))
    embeddings = model.model.language_model.embed_tokens.weight
    (newline,) = tokenizer.encode(FRAME, add_special_tokens=False)
    with torch.no_grad():
        for old, new in SPECIAL_TOKENS.items():
            if new in ("<|vision_start|>", "<|vision_end|>"):
                embeddings[tokenizer.convert_tokens_to_ids(old)] = embeddings[newline]
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(path)
    _write_tokenizer(tokenizer, path)
    _write_processor(path, tokenizer.chat_template)
    return fit


def _model(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen's language model is Llama's with biases on queries, keys and values; here they are zero.

    All rotary frequencies follow the column, so that a row of image tokens has the positions of text.  The head is not
    tied to the embeddings, because `write` gives two tokens the embedding of another.
    """
    known = llama.config
    ids = {new: tokenizer.convert_tokens_to_ids(old) for old, new in SPECIAL_TOKENS.items()}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": known.vocab_size,
            "hidden_size": known.hidden_size,
            "intermediate_size": known.intermediate_size,
            "num_hidden_layers": known.num_hidden_layers,
            "num_attention_heads": known.num_attention_heads,
            "num_key_value_heads": known.num_key_value_heads,
            "max_position_embeddings": known.max_position_embeddings,
            "rms_norm_eps": known.rms_norm_eps,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "bos_token_id": known.bos_token_id,
            "eos_token_id": known.eos_token_id,
            "pad_token_id": known.pad_token_id,
            "rope_parameters": {**known.rope_parameters, "mrope_section": [0, 0, known.head_dim // 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": tower.HIDDEN,
            "intermediate_size": 64,
            "num_heads": tower.HIDDEN // 64,
            "out_hidden_size": known.hidden_size,
            "patch_size": tower.PATCH,
            "spatial_merge_size": tower.MERGE,
            "temporal_patch_size": tower.FRAMES,
            "window_size": CELL,
            "fullatt_block_indexes": [],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"],
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    weights = model.state_dict()
    for name, weight in weights.items():
        if name.startswith("model.language_model."):
            other = llama.state_dict().get(name.replace("language_model.", ""))
            weight.zero_() if other is None else weight.copy_(other)
    weights["lm_head.weight"].copy_(llama.lm_head.weight.detach())
    return model


def _write_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """The tokenizer with SPECIAL_TOKENS renamed: a rename in the files, as no method of a tokenizer renames."""
    tokenizer.save_pretrained(path)
    saved = path / "tokenizer.json"
    contents = json.loads(saved.read_text(encoding="utf-8"))
    for added in contents["added_tokens"]:
        added["content"] = SPECIAL_TOKENS.get(added["content"], added["content"])
    vocabulary = contents["model"]["vocab"]
    contents["model"]["vocab"] = {SPECIAL_TOKENS.get(token, token): index for token, index in vocabulary.items()}
    saved.write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
    settings = path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def _write_processor(path: Path, chat_template: str) -> None:
    pixels = {"min_pixels": CELL * CELL, "max_pixels": CELL * CELL * MAX_CELLS}
    processor = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": tower.PATCH,
        "merge_size": tower.MERGE,
        "temporal_patch_size": tower.FRAMES,
        "image_mean": [tower.MEAN] * 3,
        "image_std": [tower.STD] * 3,
        "size": {"shortest_edge": pixels["min_pixels"], "longest_edge": pixels["max_pixels"]},
        **pixels,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    (path / "chat_template.json").write_text(json.dumps({"chat_template": chat_template}))
