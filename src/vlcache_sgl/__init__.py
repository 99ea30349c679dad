"""KV-cache compression for vision-language models, as a plugin of SGLang."""

from vlcache_sgl._version import __version__

__all__ = ["__version__"]
