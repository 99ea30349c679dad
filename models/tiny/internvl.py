"""InternVL, whose checkpoints are published in two formats."""

from __future__ import annotations

from pathlib import Path

from models.tiny.checkpoint import DEVIATION, HEAD_DIM, MEAN, TOWER, Checkpoint, Media

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def internvl_chat(folder: Path) -> None:
    """The original format: tiles of 448 pixels, each of 8 x 8 tokens here."""
    made = Checkpoint(folder)
    specials = ("<img>", "</img>", "<IMG_CONTEXT>", "<image>", "<video>", "<|video_pad|>")
    made.tokenizer(specials, Media("<image>\n", "<video>\n"))
    text = made.text(
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        head_dim=HEAD_DIM,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        attention_bias=False,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=36,
    )
    tower = {
        **TOWER,
        "model_type": "intern_vit_6b",
        "architectures": ["InternVisionModel"],
        "image_size": 448,
        "patch_size": 28,
        "num_channels": 3,
        "qkv_bias": True,
        "qk_normalization": False,
        "use_flash_attn": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "initializer_factor": 0.1,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    config = {
        "model_type": "internvl_chat",
        "llm_config": text,
        "vision_config": tower,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
    }
    made.config(config, "InternVLChatModel")
    made.images("CLIPImageProcessor", crop_size=224, size=224, do_center_crop=True, **IMAGENET)


def internvl_hf(folder: Path) -> None:
    """The format of transformers."""
    from transformers import InternVLConfig

    made = Checkpoint(folder)
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    names["video_token"] = "<video>"
    vocabulary = made.tokenizer(tuple(names.values()), Media("<IMG_CONTEXT>\n"), names=names)
    config = InternVLConfig(
        text_config=made.text(model_type="qwen3", head_dim=HEAD_DIM, rope_theta=1e4),
        vision_config={**TOWER, "image_size": [112, 112], "patch_size": [14, 14], "use_qk_norm": False},
        image_token_id=vocabulary["<IMG_CONTEXT>"],
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    made.config(config, "InternVLForConditionalGeneration")
    size = {"height": 112, "width": 112}
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": 12}
    made.images("GotOcr2ImageProcessor", size=size, image_mean=MEAN, image_std=DEVIATION, **tiles)
    made.videos("InternVLVideoProcessor", size=size)
    made.processor("InternVLProcessor", image_seq_length=16)
