"""Write a Qwen2.5-VL with random weights, big enough that attention counts: 12 layers, 8 heads, 2 KV heads of 64.

27 million parameters, 108 MB in float32; tokenizer and processor are those of the bundled model.  It answers nonsense,
at the speed of a model that does not.  The vision tower has one layer with small windows: on a CPU its dense masks
would otherwise be all that is measured.

    python benchmarks/models/make_model.py out/bench-model

`make_config` writes configuration and tokenizer only, for servers with ``--load-format dummy``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).parents[2] / "models/tinyvlm/grounded"
SEED = 2410_23317

TEXT: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_window_layers": 80,
    "layer_types": ["full_attention"] * 12,
    # A quarter of the 32 rotary pairs to time, the rest to height and width.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
BYTES_PER_CELL = 2 * TEXT["num_key_value_heads"] * 64 * 4
"""Key and value of one token in one layer, float32."""
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 512,
    "window_size": 112,
    "fullatt_block_indexes": [],
}


QWEN_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 262144,
    "max_window_layers": 28,
    "layer_types": ["full_attention"] * 28,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
"""The language model of Qwen2.5-VL-7B, with room for prompts of 128k tokens."""


def sized_config(text: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The bundled model's `config.json` with these sizes of the language model and our vision tower."""
    config: dict[str, Any] = json.loads((BUNDLED / "config.json").read_text())
    config["text_config"] |= text
    config["vision_config"] |= VISION | {"out_hidden_size": text["hidden_size"]}
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = dtype
    return config


def make_config(folder: Path, text: dict[str, Any], dtype: str) -> Path:
    """Write a model without weights to `folder`."""
    _copy_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(sized_config(text, dtype), indent=1) + "\n")
    return folder


def make_model(folder: Path) -> Path:
    """Write the model to `folder` unless the same one is there already."""
    config = sized_config(TEXT, "float32")
    stamp = folder / "made-from.json"
    recipe = json.dumps({"seed": SEED, "config": config}, indent=1, sort_keys=True)
    if stamp.exists() and stamp.read_text() == recipe:
        return folder
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    _copy_tokenizer(folder)
    torch.manual_seed(SEED)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config)).to(torch.float32)
    model.save_pretrained(folder)
    stamp.write_text(recipe)
    return folder


def _copy_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in BUNDLED.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "README.md"):
            shutil.copy(file, folder / file.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(make_model(parser.parse_args().folder))
