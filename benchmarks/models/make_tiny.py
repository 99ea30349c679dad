"""Write a tiny model of another architecture with random weights: is it served, spans, positions and accounting alike?

    python benchmarks/models/make_tiny.py qwen3_vl out/tiny/qwen3_vl

Tokenizer and chat template are those of the bundled model; answers are nonsense.  LLaVA is in the original checkpoint
format (`LlavaQwenForCausalLM`), with a CLIP vision tower in a folder beside the weights; SGLang runs that in half
precision, so it is to be served with `--dtype float16`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).parents[2] / "models/tinyvlm/grounded"
SEED = 2410_23317
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 4, 128, 4, 2, 32
IDS = {"image_token_id": 372, "video_token_id": 373, "vision_start_token_id": 369, "vision_end_token_id": 370}
TEXT: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 32768,
    "bos_token_id": 367,
    "eos_token_id": 368,
    "pad_token_id": 366,
    "tie_word_embeddings": False,
}
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
TILE, PATCH = 84, 14
"""Pixels of LLaVA's tiles and patches: 36 tokens each."""


def qwen2_vl(folder: Path) -> None:
    """`Qwen2VLForConditionalGeneration`."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    # `in_chans`: published checkpoints name it so, and SGLang reads that name.
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": HIDDEN, "num_heads": 4, "mlp_ratio": 2, "in_chans": 3}
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **IDS)
    _save(Qwen2VLForConditionalGeneration(config), folder)
    _copy(folder)
    _processor(folder, "Qwen2VLProcessor", patch=14)


def qwen3_vl(folder: Path) -> None:
    """`Qwen3VLForConditionalGeneration`, with one layer of deep stacking."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": HIDDEN,
        "patch_size": 16,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0],
    }
    text = {**TEXT, "head_dim": HEAD_DIM, "rope_parameters": rope, "rope_scaling": rope}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **IDS)
    _save(Qwen3VLForConditionalGeneration(config), folder)
    _copy(folder)
    _processor(folder, "Qwen3VLProcessor", patch=16)


def qwen3_5(folder: Path, *, moe: bool = False) -> None:
    """`Qwen3_5ForConditionalGeneration`: Gated Delta Networks in layers 0 and 2, full attention in 1 and 3.

    With a multi-token prediction head beside it, as published checkpoints have one.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        Qwen3_5MoeConfig,
        Qwen3_5MoeForConditionalGeneration,
    )

    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": HIDDEN,
        "patch_size": 16,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [],
    }
    text = {
        **TEXT,
        "head_dim": HEAD_DIM,
        "rope_parameters": rope,
        "partial_rotary_factor": 0.5,
        "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
        "full_attention_interval": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
    }
    if moe:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        text |= {"shared_expert_intermediate_size": 64}
        _save(
            Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=text, vision_config=vision, **IDS)), folder
        )
    else:
        _save(Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **IDS)), folder)
    weights = load_file(folder / "model.safetensors")
    norms = {f"mtp.{name}.weight": torch.ones(HIDDEN) for name in ("norm", "pre_fc_norm_embedding")}
    save_file(
        {**weights, **norms, "mtp.fc.weight": torch.randn(HIDDEN, 2 * HIDDEN)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    _copy(folder)
    _processor(folder, "Qwen3VLProcessor", patch=16)


def gemma3(folder: Path) -> None:
    """`Gemma3ForConditionalGeneration`: layers 0 and 2 see the last 64 tokens, 1 and 3 all; 64 tokens to an image."""
    from safetensors.torch import load_file, save_file
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        **TEXT,
        "head_dim": HEAD_DIM,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "query_pre_attn_scalar": HEAD_DIM,
        "tie_word_embeddings": True,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 224,
        "patch_size": 14,
        "vision_use_head": False,
    }
    ids = {"boi_token_index": 369, "eoi_token_index": 370, "image_token_index": 372}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=64, **ids)
    _save(Gemma3ForConditionalGeneration(config), folder)
    weights = load_file(folder / "model.safetensors")
    # As published, and as SGLang reads it.
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    _copy_renamed(folder, tokens, shown="<start_of_image>")
    image = {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 224, "width": 224},
        "image_seq_length": 64,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=1))
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 64}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=1))


def gemma4(folder: Path) -> None:
    """`Gemma4ForConditionalGeneration`: layers 0, 1 and 3 see the last 64 tokens, with four KV heads of 32; 2 and 4 see
    all, with one of 64; layer 5 has no keys of its own and reads those of layer 4.
    """
    from transformers import (
        AutoTokenizer,
        Gemma4AudioFeatureExtractor,
        Gemma4Config,
        Gemma4ForConditionalGeneration,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
    )

    text = {
        **TEXT,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 384,
        "tie_word_embeddings": True,
        "sliding_window": 64,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full", "full")],
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "global_head_dim": 16,
        "patch_size": 16,
        "position_embedding_size": 256,
        "pooling_kernel_size": 2,
        "default_output_length": 64,
    }
    ids = {"boi_token_id": 369, "eoi_token_id": 370, "image_token_id": 372, "video_token_id": 373}
    others = {"audio_token_id": 374, "boa_token_id": 375, "eoa_token_index": 376}
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **ids, **others)
    _save(Gemma4ForConditionalGeneration(config), folder)
    tokens = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "video_token": "<|video|>"}
    audio = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    _copy_renamed(folder, tokens, shown="<|image|>", more=audio)
    image = Gemma4ImageProcessor(max_soft_tokens=70, patch_size=16, pooling_kernel_size=2)
    video = Gemma4VideoProcessor(max_soft_tokens=70, patch_size=16, pooling_kernel_size=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    Gemma4Processor(Gemma4AudioFeatureExtractor(), image, tokenizer, video).save_pretrained(folder)


def llava(folder: Path) -> None:
    """`LlavaQwenForCausalLM` with tiles of any resolution (``anyres``, unpadded)."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

    tower = folder / "clip"  # SGLang recognises the kind of tower by its path
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
    )
    _save(CLIPVisionModel(vision), tower)
    processor = CLIPImageProcessor(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_mean=MEAN, image_std=DEVIATION
    )
    processor.save_pretrained(tower)
    processor.save_pretrained(folder)
    text = Qwen2Config(**TEXT, rope_theta=1e4)
    weights = dict(_random(Qwen2ForCausalLM(text)).state_dict())
    for layer, (width, name) in enumerate(((64, "0"), (HIDDEN, "2"))):
        weights[f"model.mm_projector.{name}.weight"] = torch.randn(HIDDEN, width) * 0.1
        weights[f"model.mm_projector.{name}.bias"] = torch.randn(HIDDEN) * 0.1 * layer
    weights["model.image_newline"] = torch.randn(HIDDEN) * 0.1
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    config = {
        **text.to_dict(),
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "dtype": "float32",
        "mm_vision_tower": str(tower.resolve()),
        "mm_hidden_size": 64,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_token_index": IDS["image_token_id"],
        "image_grid_pinpoints": [[TILE * w, TILE * h] for w, h in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (3, 3))],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _copy(folder)
    # Its own tokenizer's chat template has one place-holder per image and nothing around it.
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>")
    )


MODELS: dict[str, Callable[[Path], None]] = {
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": partial(qwen3_5, moe=True),
    "gemma3": gemma3,
    "gemma4": gemma4,
    "llava": llava,
}


def make_tiny(name: str, folder: Path) -> Path:
    """Write the model to `folder` unless it is there already."""
    stamp = folder / "made-from.json"
    recipe = json.dumps({"name": name, "script": Path(__file__).read_text()})
    if not (stamp.exists() and stamp.read_text() == recipe):
        import torch

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        torch.manual_seed(SEED)
        MODELS[name](folder)
        stamp.write_text(recipe)
    return folder


def _random(model: Any) -> Any:
    """Larger weights than transformers' own, so that attention looks somewhere and outputs differ."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 1.0 / weight[0].numel() ** 0.5)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.02)
    return model


def _save(model: Any, folder: Path) -> None:
    import torch

    _random(model.to(torch.float32)).save_pretrained(folder)


def _copy(folder: Path) -> None:
    """Tokenizer and chat template of the bundled model."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"):
        shutil.copy(BUNDLED / name, folder / name)


def _copy_renamed(folder: Path, tokens: dict[str, str], shown: str, more: dict[str, str] | None = None) -> None:
    """`_copy` with names of another family.

    Args:
        tokens: what the family calls the tokens that begin and end an image and that stand for a part of it, and of
            a video, by `boi_token`, `eoi_token`, `image_token` and `video_token`.
        shown: what its chat template writes for an image.
        more: special tokens that ours has not.
    """
    _copy(folder)
    ours = {
        "boi_token": "<|vision_start|>",
        "eoi_token": "<|vision_end|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    for file in ("tokenizer.json", "chat_template.jinja", "chat_template.json"):
        text = (folder / file).read_text().replace("".join(ours[name] for name in ("boi_token", "image_token")), "@")
        text = text.replace("@" + ours["eoi_token"], shown)
        for name, token in tokens.items():
            text = text.replace(ours[name], token)
        (folder / file).write_text(text)
    special = tokens | (more or {})
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | special
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "extra_special_tokens": special}, indent=1))


def _processor(folder: Path, name: str, patch: int) -> None:
    settings = json.loads((BUNDLED / "preprocessor_config.json").read_text())
    settings |= {"processor_class": name, "patch_size": patch}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1))
    video = {**settings, "video_processor_type": name.replace("Processor", "VideoProcessor")}
    video.pop("image_processor_type")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    print(make_tiny(given.name, given.folder))
