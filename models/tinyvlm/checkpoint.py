"""The model on disk: stock Hugging Face files, nothing of this project in them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlcache_sgl.evaluation.tasks.receipts import COLOUR_NAMES, LETTERS, TEMPLATES

from .batches import IMAGE_MEAN, IMAGE_STD, PATCH

HERE = Path(__file__).parent
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] in ['image','image_url'] %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif c['type']=='video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HIDDEN, LAYERS, HEADS, KV_HEADS = 192, 6, 6, 2
VISION_HIDDEN, VISION_HEADS = 64, 4


def folder(name: str) -> Path:
    """The checkpoint folder of a schedule, beside this file."""
    return HERE / name


def load(path: Path) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """Model in float32 and tokenizer."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    return model, PreTrainedTokenizerFast.from_pretrained(path)


def save(model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write `path` as a folder that transformers and SGLang load as it is, weights in bfloat16."""
    stored = Qwen2_5_VLForConditionalGeneration(model.config)
    stored.load_state_dict(model.state_dict())
    stored.generation_config.eos_token_id = model.config.text_config.eos_token_id
    stored.generation_config.do_sample = False
    stored.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    # Slots in what save_pretrained leaves out for a tokenizer and a processor that were never on the hub.
    _edit(path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    _edit(path / "chat_template.json", chat_template=CHAT_TEMPLATE)
    _edit(
        path / "preprocessor_config.json",
        image_processor_type="Qwen2VLImageProcessorFast",
        processor_class="Qwen2_5_VLProcessor",
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=3136,
        max_pixels=1003520,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
        size={"shortest_edge": 3136, "longest_edge": 1003520},
    )


def _edit(path: Path, **fields: object) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    for key in ("is_local", "local_files_only"):  # where this process read the tokenizer: nobody else's concern
        known.pop(key, None)
    path.write_text(json.dumps(known | fields))


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the questions' words: one token per colour, letter and code character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [
        t.format(colour=colour, letter=letter) for t in TEMPLATES for colour in COLOUR_NAMES for letter in LETTERS
    ]
    corpus += ["user", "assistant", "system"] * 200
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """The architecture with fresh weights, in float32.

    One vision layer whose window is one cell (28 pixels), so that nothing leaks between image tokens before the
    language model; a small rope theta, because no prompt is longer than some 1,100 tokens.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": (len(tokenizer) + 63) // 64 * 64,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [2, 5, 9]},
            "tie_word_embeddings": False,
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_heads": VISION_HEADS,
            "out_hidden_size": HIDDEN,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 2 * PATCH,
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
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _initialise(name, weight)
    return model


def _initialise(name: str, weight: torch.Tensor) -> None:
    """Wider than the stock 0.02, which learns too slowly at this size."""
    if weight.dim() == 2 and "layers." in name:
        deviation = 1 / math.sqrt(weight.shape[1])
        if "o_proj" in name or "down_proj" in name:
            deviation /= math.sqrt(2 * LAYERS)
        weight.normal_(0, deviation)
    elif "embed_tokens" in name:
        weight.normal_(0, 1.0)
    elif weight.dim() >= 2:
        weight.normal_(0, 1 / math.sqrt(weight[0].numel()))
    elif name.endswith("bias"):
        weight.zero_()
