"""LLaVA-OneVision in the format of transformers: images are cut into tiles."""

from __future__ import annotations

from pathlib import Path

from models.tiny.checkpoint import HALF, Checkpoint, Media

TILE = 112
"""Pixels of a tile: 8 x 8 patches."""
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": 14,
}


def llava_onevision(folder: Path) -> None:
    from transformers import LlavaOnevisionConfig

    made = Checkpoint(folder)
    names = {"image_token": "<image>", "video_token": "<video>"}
    vocabulary = made.tokenizer(tuple(names.values()), Media("<image>\n", "<video>\n"), names=names)
    grids = [[TILE * rows, TILE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    tower = {**TOWER, "model_type": "siglip_vision_model", "num_hidden_layers": 3, "vision_use_head": False}
    config = LlavaOnevisionConfig(
        text_config=made.text(model_type="qwen2", rope_theta=1e4),
        vision_config=tower,
        image_token_index=vocabulary["<image>"],
        video_token_index=vocabulary["<video>"],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_grid_pinpoints=grids,
    )
    made.config(config, "LlavaOnevisionForConditionalGeneration")
    size = {"height": TILE, "width": TILE}
    colours = {"image_mean": HALF, "image_std": HALF}
    made.images("LlavaOnevisionImageProcessor", size=size, image_grid_pinpoints=grids, do_pad=True, **colours)
    made.videos("LlavaOnevisionVideoProcessor", size=size, **colours)
    made.processor("LlavaOnevisionProcessor", num_image_tokens=64, vision_feature_select_strategy="full", **names)
