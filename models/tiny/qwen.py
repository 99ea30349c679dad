"""Qwen's families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.tiny.checkpoint import DEVIATION, HEAD_DIM, HIDDEN, MEAN, Checkpoint, Media, Vocabulary

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
BEGIN, FINISH = "<|vision_start|>", "<|vision_end|>"
SPECIALS = (BEGIN, FINISH, "<|vision_pad|>", IMAGE, VIDEO)
MEDIA = Media(f"{BEGIN}{IMAGE}{FINISH}", f"{BEGIN}{VIDEO}{FINISH}")
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
TOWER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": HIDDEN,
    "patch_size": 16,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [0, 1, 2],
}


def ids_of(vocabulary: Vocabulary) -> dict[str, int]:
    return {
        "image_token_id": vocabulary[IMAGE],
        "video_token_id": vocabulary[VIDEO],
        "vision_start_token_id": vocabulary[BEGIN],
        "vision_end_token_id": vocabulary[FINISH],
    }


def processors(checkpoint: Checkpoint, kind: str, patch: int) -> None:
    size = {"shortest_edge": 3136, "longest_edge": 1003520}
    settings = {"processor_class": kind, "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    settings |= {"min_pixels": 3136, "max_pixels": 1003520, "image_mean": MEAN, "image_std": DEVIATION}
    checkpoint.images("Qwen2VLImageProcessorFast", **settings)
    checkpoint.videos(kind.replace("Processor", "VideoProcessor"), **settings)


def qwen3_vl_moe(folder: Path) -> None:
    from transformers import Qwen3VLMoeConfig

    made = Checkpoint(folder)
    vocabulary = made.tokenizer(SPECIALS, MEDIA)
    text = made.text(**EXPERTS, head_dim=HEAD_DIM, rope_parameters=ROPE, rope_scaling=ROPE)
    config = Qwen3VLMoeConfig(text_config=text, vision_config=TOWER, **ids_of(vocabulary))
    made.config(config, "Qwen3VLMoeForConditionalGeneration")
    processors(made, "Qwen3VLProcessor", 16)


def qwen3_omni(folder: Path) -> None:
    """The thinker, which reads audio as well."""
    from transformers import Qwen3OmniMoeConfig

    made, audio = Checkpoint(folder), ("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")
    names = {"image_token": IMAGE, "video_token": VIDEO, "audio_token": audio[2]}
    names |= {"vision_bos_token": BEGIN, "vision_eos_token": FINISH}
    names |= {"audio_bos_token": audio[0], "audio_eos_token": audio[1]}
    media = Media(MEDIA.image, MEDIA.video, f"{audio[0]}{audio[2]}{audio[1]}")
    vocabulary = made.tokenizer((*SPECIALS, *audio), media, names=names)
    ears = {"num_mel_bins": 128, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    ears |= {"d_model": 64, "output_dim": HIDDEN, "downsample_hidden_size": 32, "n_window": 50, "n_window_infer": 400}
    thinker = {
        "text_config": made.text(**EXPERTS, head_dim=HEAD_DIM, rope_parameters=ROPE, rope_scaling=ROPE),
        "vision_config": TOWER,
        "audio_config": ears,
        **ids_of(vocabulary),
        "audio_token_id": vocabulary[audio[2]],
        "audio_start_token_id": vocabulary[audio[0]],
        "audio_end_token_id": vocabulary[audio[1]],
    }
    config = Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    made.config(config, "Qwen3OmniMoeForConditionalGeneration")
    processors(made, "Qwen3OmniMoeProcessor", 16)
    made.amend(
        "preprocessor_config.json",
        feature_extractor_type="WhisperFeatureExtractor",
        video_processor_type="Qwen2VLVideoProcessor",
        feature_size=128,
        sampling_rate=16000,
        hop_length=160,
        n_fft=400,
        chunk_length=30,
        padding_value=0.0,
        return_attention_mask=True,
    )
    made.amend("video_preprocessor_config.json", video_processor_type="Qwen2VLVideoProcessor")
