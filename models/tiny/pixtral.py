"""Families with Pixtral's tower: Mistral-Small-3, Ministral-3, Pixtral in the format of transformers, LightOnOCR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.tiny.checkpoint import DEVIATION, HEAD_DIM, MEAN, Checkpoint, Media, Vocabulary

PATCH = 14
TOWER: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "image_size": 560,
    "patch_size": PATCH,
    "rope_theta": 1e4,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
    "apply_yarn_scaling": False,
}


def _tokens(made: Checkpoint) -> Vocabulary:
    return made.tokenizer(("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"), Media("[IMG]"), pad="<pad>")


def _processors(made: Checkpoint, kind: str, **settings: Any) -> None:
    longest = {"longest_edge": 560}
    made.images("PixtralImageProcessor", patch_size=PATCH, size=longest, image_mean=MEAN, image_std=DEVIATION)
    made.processor(kind, patch_size=PATCH, **settings)


def _mistral(folder: Path, **text: Any) -> None:
    from transformers import Mistral3Config

    made = Checkpoint(folder)
    vocabulary = _tokens(made)
    config = Mistral3Config(
        text_config=made.text(head_dim=HEAD_DIM, sliding_window=None, **text),
        vision_config=TOWER,
        image_token_index=vocabulary["[IMG]"],
        spatial_merge_size=2,
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
    )
    made.config(config, "Mistral3ForConditionalGeneration")
    names = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    _processors(made, "PixtralProcessor", spatial_merge_size=2, **names)


def mistral3(folder: Path) -> None:
    _mistral(folder, model_type="mistral", rope_theta=1e4)


def ministral3(folder: Path) -> None:
    _mistral(folder, model_type="ministral3", rope_parameters=YARN)


def pixtral(folder: Path) -> None:
    from transformers import LlavaConfig

    made = Checkpoint(folder)
    vocabulary = _tokens(made)
    config = LlavaConfig(
        text_config=made.text(model_type="mistral", head_dim=HEAD_DIM, rope_theta=1e4, sliding_window=None),
        vision_config=TOWER,
        image_token_index=vocabulary["[IMG]"],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    made.config(config, "LlavaForConditionalGeneration")
    names = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    _processors(made, "PixtralProcessor", **names)


def lightonocr(folder: Path) -> None:
    from transformers import LightOnOcrConfig

    made = Checkpoint(folder)
    names = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    vocabulary = made.tokenizer(tuple(names.values()), Media("<|image_pad|>"), names=names)
    config = LightOnOcrConfig(
        text_config=made.text(model_type="qwen3", head_dim=HEAD_DIM, rope_theta=1e4),
        vision_config=TOWER,
        image_token_id=vocabulary["<|image_pad|>"],
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    made.config(config, "LightOnOCRForConditionalGeneration")
    _processors(made, "LightOnOcrProcessor", spatial_merge_size=2)
