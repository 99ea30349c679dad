"""Finding policies by name and putting scorer, allocator and selection together."""

from vlcache_sgl.policy.errors import PolicyError
from vlcache_sgl.policy.manager import Registry, registry
from vlcache_sgl.policy.policy import Policy, resolve

__all__ = ["Policy", "PolicyError", "Registry", "registry", "resolve"]
