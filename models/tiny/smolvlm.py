"""SmolVLM: images are cut into tiles, each told by its row and column."""

from __future__ import annotations

from pathlib import Path

from models.tiny.checkpoint import HALF, HEAD_DIM, TOWER, Checkpoint, Media

TILE, PATCH = 112, 14


def smolvlm(folder: Path) -> None:
    from transformers import SmolVLMConfig

    made = Checkpoint(folder)
    names = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    }
    places = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
    vocabulary = made.tokenizer((*names.values(), *places), Media("<image>"), names=names)
    config = SmolVLMConfig(
        text_config=made.text(model_type="llama", head_dim=HEAD_DIM, rope_theta=1e4),
        vision_config={**TOWER, "image_size": TILE, "patch_size": PATCH},
        scale_factor=2,
        image_token_id=vocabulary["<image>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    made.config(config, "SmolVLMForConditionalGeneration")
    sizes = {"size": {"longest_edge": 4 * TILE}, "max_image_size": {"longest_edge": TILE}}
    made.images("SmolVLMImageProcessor", **sizes, image_mean=HALF, image_std=HALF)
    made.videos("SmolVLMVideoProcessor", **sizes, image_mean=HALF, image_std=HALF)
    made.processor("SmolVLMProcessor", image_seq_len=(TILE // PATCH) ** 2 // 4)
