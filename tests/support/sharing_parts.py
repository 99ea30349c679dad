"""The parts of sharing for tests without a server."""

from __future__ import annotations

from typing import Any

from vlcache_sgl.api import Prompt
from vlcache_sgl.compression.sharing.images import SharedImages
from vlcache_sgl.compression.sharing.sharing import Sharing
from vlcache_sgl.config import KVConfig
from vlcache_sgl.policy import resolve


def make_sharing(model: Prompt, images: SharedImages | None = None, **settings: Any) -> Sharing:
    """With `settings` of the server's configuration."""
    config = KVConfig("vlcache", **settings)
    return Sharing(config, resolve(config.share_policy), model, SharedImages() if images is None else images, 2**20)
