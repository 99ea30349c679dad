"""What surrounds a `scheduler_world.World`: a device that is behind, and SGLang's batch as admission sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.managers.schedule_batch import Req

from vlcache_sgl.compression.exact import HostMemory

if TYPE_CHECKING:
    from scheduler_world import World


class Event:
    """Of a device that is behind: passes when somebody waits for it, or when time goes on."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True


class LaggingHostMemory(HostMemory):
    """Of a device that may be behind with what it frees."""

    def __init__(self, world: World, recall: bool) -> None:
        super().__init__(world.allocator.accounting, world.room, recall=recall)
        self._world = world

    def _retire(self, slots: torch.Tensor, keep: torch.Tensor) -> None:
        self._world.retire(slots, keep)


class Batch:
    """The running requests, as admission sees SGLang's batch."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.reqs: list[Req] = []
        self.batch_is_full = False

    def batch_size(self) -> int:
        return len(self.reqs)

    def check_decode_mem(self) -> bool:
        world = self._world
        return bool(world.allocator.check_decode_capacity(num_tokens=len(self.reqs), tree_cache=world.tree))
