"""GLM's families: 4.1V and 4.6V-Flash, 4.5V and 4.6V with experts, and OCR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.tiny.checkpoint import DEVIATION, HEAD_DIM, HIDDEN, MEAN, Checkpoint, Media, Vocabulary

IMAGE, VIDEO = "<|image|>", "<|video|>"
BEGIN, FINISH = "<|begin_of_image|>", "<|end_of_image|>"
VIDEO_BEGIN, VIDEO_FINISH = "<|begin_of_video|>", "<|end_of_video|>"
SPECIALS = (IMAGE, VIDEO, BEGIN, FINISH, VIDEO_BEGIN, VIDEO_FINISH, "[gMASK]", "<sop>")
MEDIA = Media(f"{BEGIN}{IMAGE}{FINISH}", f"{VIDEO_BEGIN}{VIDEO}{VIDEO_FINISH}")
PATCH = 14
TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": HIDDEN,
    "patch_size": PATCH,
    "image_size": 336,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "attention_bias": True,
    "use_qk_norm": False,
}


def ids_of(vocabulary: Vocabulary) -> dict[str, int]:
    return {
        "image_token_id": vocabulary[IMAGE],
        "video_token_id": vocabulary[VIDEO],
        "image_start_token_id": vocabulary[BEGIN],
        "image_end_token_id": vocabulary[FINISH],
        "video_start_token_id": vocabulary[VIDEO_BEGIN],
        "video_end_token_id": vocabulary[VIDEO_FINISH],
    }


def processors(made: Checkpoint, family: str, image: str) -> None:
    """Write the settings of the processors of `family`, whose image processor's class is `image`."""
    size = {"shortest_edge": 12544, "longest_edge": 1003520}
    settings = {"processor_class": f"{family}Processor", "patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    settings |= {"image_mean": MEAN, "image_std": DEVIATION, "size": size}
    made.images(image, **settings)
    made.videos(f"{family}VideoProcessor", **settings)


def _vision(folder: Path, config: Any, architecture: str, **text: Any) -> None:
    made = Checkpoint(folder)
    vocabulary = made.tokenizer(SPECIALS, MEDIA)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    sizes = made.text(head_dim=HEAD_DIM, rope_parameters=rope, rope_scaling=rope, partial_rotary_factor=0.5, **text)
    made.config(config(text_config=sizes, vision_config=TOWER, **ids_of(vocabulary)), architecture)
    processors(made, "Glm4v", "Glm4vImageProcessorFast")


def glm4v(folder: Path) -> None:
    from transformers import Glm4vConfig

    _vision(folder, Glm4vConfig, "Glm4vForConditionalGeneration")


def glm4v_moe(folder: Path) -> None:
    from transformers import Glm4vMoeConfig

    _vision(folder, Glm4vMoeConfig, "Glm4vMoeForConditionalGeneration", **EXPERTS)


def glm_ocr(folder: Path) -> None:
    from transformers import GlmOcrConfig

    made = Checkpoint(folder)
    vocabulary = made.tokenizer(SPECIALS, MEDIA)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6], "partial_rotary_factor": 1.0}
    text = made.text(head_dim=HEAD_DIM, rope_parameters=rope, rope_scaling=rope)
    config = GlmOcrConfig(text_config=text, vision_config=TOWER, **ids_of(vocabulary))
    made.config(config, "GlmOcrForConditionalGeneration")
    processors(made, "Glm46V", "Glm46VImageProcessor")
