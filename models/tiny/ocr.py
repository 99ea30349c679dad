"""Small models that read documents: PaddleOCR-VL and dots.ocr."""

from __future__ import annotations

import json
from pathlib import Path

from models.tiny.checkpoint import DEVIATION, HALF, HEAD_DIM, HIDDEN, MEAN, TOWER, Checkpoint, Media

PATCHES = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 1, "max_pixels": 1003520}


def paddleocr_vl(folder: Path) -> None:
    from transformers import PaddleOCRVLConfig

    made = Checkpoint(folder)
    image, begin, finish = "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>"
    specials, media = (begin, image, finish, "<|video_pad|>"), Media(f"{begin}{image}{finish}")
    vocabulary = made.tokenizer(specials, media, names={"image_token": image})
    rope = {"rope_type": "default", "type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    config = PaddleOCRVLConfig(
        text_config=made.text(head_dim=HEAD_DIM, rope_parameters=rope, rope_scaling=rope, rope_theta=1e4),
        vision_config={**TOWER, "image_size": 384, "patch_size": 14, "tokens_per_second": 2},
        image_token_id=vocabulary[image],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary[begin],
        vision_end_token_id=vocabulary[finish],
        tie_word_embeddings=False,
    )
    values = json.loads(config.to_json_string(use_diff=False))
    # SGLang reads the language model's sizes where published checkpoints have them: beside the tower's.
    flat = {**values, **values["text_config"], "model_type": "paddleocr_vl", "rope_scaling": rope, "use_bias": False}
    made.config(flat, "PaddleOCRVLForConditionalGeneration")
    size = {"shortest_edge": 12544, "longest_edge": 1003520}
    settings = {**PATCHES, "min_pixels": 12544, "image_mean": HALF, "image_std": HALF, "size": size}
    made.images("PaddleOCRVLImageProcessor", processor_class="PaddleOCRVLProcessor", **settings)
    made.processor("PaddleOCRVLProcessor")


def dots_ocr(folder: Path) -> None:
    made = Checkpoint(folder)
    image, begin, finish, video = "<|imgpad|>", "<|img|>", "<|endofimg|>", "<|video_pad|>"
    names = {"image_token": image, "video_token": video}
    vocabulary = made.tokenizer((begin, image, finish, video), Media(f"{begin}{image}{finish}"), names=names)
    tower = {
        **TOWER,
        "embed_dim": 64,
        "hidden_size": HIDDEN,
        "num_channels": 3,
        "patch_size": 14,
        "post_norm": True,
        "rms_norm_eps": 1e-5,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "use_bias": False,
    }
    config = made.text(
        model_type="dots_ocr",
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        sliding_window=131072,
        use_sliding_window=False,
        max_window_layers=28,
        attention_bias=True,
        image_token_id=vocabulary[image],
        video_token_id=vocabulary[video],
        vision_config=tower,
    )
    made.config(config, "DotsOCRForCausalLM")
    size = {"shortest_edge": 3136, "longest_edge": 1003520}
    settings = {**PATCHES, "min_pixels": 3136, "image_mean": MEAN, "image_std": DEVIATION, "size": size}
    made.images("Qwen2VLImageProcessor", **settings)
