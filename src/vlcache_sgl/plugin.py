"""SGLang's entry point, called in every process: flags always, everything else only where a policy is asked for."""

from __future__ import annotations


def register() -> None:
    """Make SGLang know our flags.

    SGLang logs and ignores whatever is raised here; `Scheduler.__init__` then fails to find its settings, and flags
    that were given are refused as unknown: nobody is served uncompressed by accident.
    """
    from vlcache_sgl.sglang_hooks.patching import Patches
    from vlcache_sgl.sglang_hooks.startup import START_POINTS

    Patches(START_POINTS).install()
