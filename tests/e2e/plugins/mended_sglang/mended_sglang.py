"""What SGLang 0.5.23 lacks to serve two families, with a policy or without: without it they cannot be looked at.

An SGLang plugin: distributions on PYTHONPATH are found beside installed ones.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    from sglang.srt.configs.shared_experts import SharedExpertsConfig
    from sglang.srt.models.minicpmv import MiniCPMBaseModel
    from sglang.srt.multimodal.processors.llava import LlavaMultimodalProcessor

    # MiniCPM-V: the loader sets it on a wrapper and goes on with what is in the wrapper; no server starts.
    MiniCPMBaseModel.shared_experts_config = SharedExpertsConfig()
    # Pixtral and Mistral 3: the processor has a cache, the wrapper around it none; /flush_cache answers 500.
    LlavaMultimodalProcessor.clear_preprocess_cache = _clear


def _clear(processor: Any) -> None:
    processor.inner.clear_preprocess_cache()
