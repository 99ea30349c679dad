"""MiniCPM-V 4.5.  Its checkpoints bring their own code; this one brings a small processor that answers alike.

An image is one view of 448 x 448 pixels and, where it is wider than high, its two halves: 64 tokens each.
"""

from __future__ import annotations

from pathlib import Path

from models.tiny.checkpoint import HEAD_DIM, Checkpoint, Media

SIDE, PATCH, QUERIES = 448, 14, 64
IMAGE = "(<image>./</image>)"

CONFIGURATION = """
from transformers import Qwen3Config, SiglipVisionConfig


class MiniCPMVConfig(Qwen3Config):
    model_type = "minicpmv"

    def __init__(self, vision_config=None, **others):
        for name in ("query_num", "image_size", "patch_size", "version", "slice_mode", "use_image_id"):
            setattr(self, name, others.pop(name, None))
        self.drop_vision_last_layer = others.pop("drop_vision_last_layer", False)
        self.batch_vision_input = others.pop("batch_vision_input", True)
        parts = {name: value for name, value in (vision_config or {}).items() if name != "model_type"}
        self.vision_config = SiglipVisionConfig(**parts)
        super().__init__(**others)
"""

PROCESSOR = f'''
import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

SIDE, PATCH, QUERIES, IMAGE = {SIDE}, {PATCH}, {QUERIES}, "{IMAGE}"


class MiniCPMVProcessor(ProcessorMixin):
    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, **others):
        super().__init__(tokenizer)

    def strips(self, view):
        pixels = torch.from_numpy(np.asarray(view.convert("RGB").resize((SIDE, SIDE)))).permute(2, 0, 1) / 127.5 - 1
        patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
        return patches.permute(0, 3, 1, 2, 4).reshape(3, PATCH, -1)

    def __call__(self, text=None, images=None, **others):
        text = text[0] if isinstance(text, (list, tuple)) else text
        first, *parts = text.split(IMAGE)
        written, pixels, sizes = first, [], []
        for number, (part, image) in enumerate(zip(parts, images or [])):
            views, half = [image], image.width // 2
            words = f"<image_id>{{number}}</image_id><image>{{'<unk>' * QUERIES}}</image>"
            if image.width > image.height:
                views += [image.crop((0, 0, half, image.height)), image.crop((half, 0, image.width, image.height))]
                words += f"<slice>{{'<unk>' * QUERIES}}</slice>" * 2
            written += words + part
            pixels.append([self.strips(view) for view in views])
            sizes.append(torch.tensor([[SIDE // PATCH] * 2] * len(views)))
        ids = self.tokenizer(written, add_special_tokens=False)["input_ids"]
        return BatchFeature({{"input_ids": torch.tensor([ids]), "pixel_values": pixels, "tgt_sizes": sizes}})
'''

TOKENIZER = """
from transformers import PreTrainedTokenizerFast


def number_of(token):
    return property(lambda tokenizer: tokenizer.convert_tokens_to_ids(token))


class MiniCPMVTokenizerFast(PreTrainedTokenizerFast):
    im_start_id, im_end_id = number_of("<image>"), number_of("</image>")
    slice_start_id, slice_end_id = number_of("<slice>"), number_of("</slice>")
    unk_id = number_of("<unk>")
"""


def minicpmv4_5(folder: Path) -> None:
    made = Checkpoint(folder)
    specials = ("<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
    made.tokenizer(specials, Media(f"{IMAGE}\n"), names={"unk_token": "<unk>"})
    for name, code in (("configuration", CONFIGURATION), ("processing", PROCESSOR), ("tokenization", TOKENIZER)):
        (folder / f"{name}_minicpmv.py").write_text(code)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = made.text(
        model_type="minicpmv",
        version=4.5,
        head_dim=HEAD_DIM,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        attention_bias=False,
        vision_config={**tower, "image_size": SIDE, "patch_size": PATCH},
        query_num=QUERIES,
        image_size=SIDE,
        patch_size=PATCH,
        drop_vision_last_layer=False,
        batch_vision_input=True,
        slice_mode=True,
        use_image_id=True,
        auto_map={"AutoConfig": "configuration_minicpmv.MiniCPMVConfig"},
    )
    made.config(config, "MiniCPMV")
    kind = "tokenization_minicpmv.MiniCPMVTokenizerFast"
    made.amend(
        "tokenizer_config.json", tokenizer_class="MiniCPMVTokenizerFast", auto_map={"AutoTokenizer": [None, kind]}
    )
    processor = {"AutoProcessor": "processing_minicpmv.MiniCPMVProcessor"}
    made.processor("MiniCPMVProcessor", auto_map=processor)
    made.images("CLIPImageProcessor", processor_class="MiniCPMVProcessor", auto_map=processor)
