"""Write a Qwen2.5-VL with random weights, big enough that attention counts: 12 layers, 8 heads, 2 KV heads of 64.

27 million parameters, 108 MB in float32; tokenizer and processor are those of the bundled model.  It answers nonsense,
at the speed of a model that does not.  The vision tower has one layer with small windows: on a CPU its dense masks
would otherwise be all that is measured.

    python benchmarks/make_model.py out/bench-model
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).parents[1] / "models/tinyvlm/grounded"
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


def bench_config() -> dict[str, Any]:
    """The bundled model's `config.json` with larger sizes."""
    config: dict[str, Any] = json.loads((BUNDLED / "config.json").read_text())
    config["text_config"] |= TEXT
    config["vision_config"] |= VISION
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    return config


def make_model(folder: Path) -> Path:
    """Write the model to `folder` unless the same one is there already."""
    config = bench_config()
    stamp = folder / "made-from.json"
    recipe = json.dumps({"seed": SEED, "config": config}, indent=1, sort_keys=True)
    if stamp.exists() and stamp.read_text() == recipe:
        return folder
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    for file in BUNDLED.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "README.md"):
            shutil.copy(file, folder / file.name)
    torch.manual_seed(SEED)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config)).to(torch.float32)
    model.save_pretrained(folder)
    stamp.write_text(recipe)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(make_model(parser.parse_args().folder))
