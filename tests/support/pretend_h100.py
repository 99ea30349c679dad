"""What SGLang decides, and what we install, on a machine with an H100: a script that pretends to have one.

Prints a JSON line about each model that it is told, and one about patches.  Nothing is launched: arguments are resolved
as a server does it, and our patches are installed on the modules that SGLang loads there.  Needs a `libcuda.so.1` on
the library path that does nothing.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

MEMORY_MIB = 81559


class Properties:
    name = "NVIDIA H100 80GB HBM3"
    major, minor = 9, 0
    multi_processor_count = 132
    total_memory = 80 << 30
    L2_cache_size = 50 << 20
    warp_size = 32
    max_threads_per_multi_processor = 2048
    shared_memory_per_block_optin = 232448
    regs_per_multiprocessor = 65536
    is_integrated = False
    gcnArchName = ""


def pretend() -> None:
    """Before SGLang is imported: it asks PyTorch what there is."""
    torch.version.cuda = "13.0"
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: Properties.name,
        "get_device_properties": lambda *_: Properties,
        "mem_get_info": lambda *_: (79 << 30, 80 << 30),
        "_lazy_init": lambda: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def pretend_memory() -> None:
    """Of the device, which SGLang asks a program for."""
    module: Any
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("sglang") and hasattr(module, "get_device_memory_capacity"):
            module.get_device_memory_capacity = lambda *_, **__: MEMORY_MIB


def resolved(flags: list[str]) -> dict[str, Any]:
    """What a server with these flags would use."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import prepare_server_args

    arguments = prepare_server_args(flags)
    pretend_memory()
    arguments.resolve_once()
    view = resolved_view(arguments)
    graphs = view.cuda_graph_config
    return {
        "attention_backend": view.attention_backend,
        "page_size": view.page_size,
        "radix_eviction_policy": view.radix_eviction_policy,
        "decode_graphs": graphs.decode.backend,
        "prefill_graphs": graphs.prefill.backend,
        "decode_sizes": len(graphs.decode.bs or []),
        "overlap": not view.disable_overlap_schedule,
    }


def installed() -> dict[str, Any]:
    """Our patches on the modules of a CUDA machine, and models that were imported too early for them."""
    from vlcache_sgl.config import config_from
    from vlcache_sgl.sglang_hooks.patch_points import runtime_points
    from vlcache_sgl.sglang_hooks.patching import Patches
    from vlcache_sgl.sglang_hooks.session import Session

    importlib.import_module("sglang.srt.managers.scheduler")
    early = sorted(name for name in sys.modules if name.startswith("sglang.srt.models.qwen"))
    config = config_from({"kv_policy": "vlcache"})
    assert config is not None
    points = runtime_points(Session(config))
    patches = Patches(points)
    patches.install()
    patches.verify()
    from sglang.srt.models import utils

    late = {}
    for name in ("qwen2_5_vl", "qwen3_vl", "llava", "gemma3_mm"):
        module = importlib.import_module(f"sglang.srt.models.{name}")
        asked = vars(module).get("enable_fused_set_kv_buffer", utils.enable_fused_set_kv_buffer)
        late[name] = asked is utils.enable_fused_set_kv_buffer
    return {"points": len(points), "early": early, "models": late}


def main() -> None:
    pretend()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    pretend_memory()
    platform = importlib.import_module("sglang.srt.platforms").current_platform
    for model in sys.argv[1:]:
        common = ["--model-path", str(Path(model)), "--load-format", "dummy", "--enable-multimodal"]
        found: dict[str, Any] = {"platform": type(platform).__name__}
        found["stock"] = resolved(common)
        found["ours"] = resolved([*common, "--kv-policy", "vlcache"])
        print(json.dumps(found))
    print(json.dumps(installed()))


if __name__ == "__main__":
    main()
