"""Stands for a future SGLang in which a method that we patch has another name.

An SGLang plugin that runs before ours: distributions on PYTHONPATH are found before installed ones.
"""

from __future__ import annotations


def register() -> None:
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    KVCacheConfigurator._make_mha_kv_pool = KVCacheConfigurator._build_mha_kv_pool
    del KVCacheConfigurator._build_mha_kv_pool
