"""How our settings travel: on SGLang's ServerArgs, into every process."""

from __future__ import annotations

from vlcache_sgl.config import KVConfig
from vlcache_sgl.sglang_hooks.facades import ServerArgs

CONFIG_ATTRIBUTE = "_vlcache_config"
"""Where a `KVConfig` travels on SGLang's ServerArgs: underscored attributes survive pickling into child processes."""


def config_of(server_args: ServerArgs) -> KVConfig | None:
    """The settings that came with `server_args`; None when no policy was asked for."""
    config: KVConfig | None = getattr(server_args, CONFIG_ATTRIBUTE, None)
    return config


def give_config(server_args: ServerArgs, config: KVConfig) -> None:
    """Let every process that gets `server_args` compress as `config` says."""
    setattr(server_args, CONFIG_ATTRIBUTE, config)
