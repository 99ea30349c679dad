"""SGLang's radix tree, told what our allocator must know: which slots it owns and which are in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.memory.own_slots import HostShare
from vlcache_sgl.sglang_hooks.facades import Req
from vlcache_sgl.sglang_hooks.image_states import drop_state, keep_state
from vlcache_sgl.sglang_hooks.jobs import job_of


class CompressedPrefixTree(UnifiedRadixCache):
    """The stock tree; it stores virtual slots and never learns that some of them are evicted in some layers."""

    def checkpoint_into_tree(self, req: Req, *, up_to: int, **kwargs: Any) -> None:
        job = job_of(req)
        if job is not None and job.holds_back(up_to):
            # A prompt is published after compression only: others must not rely on tokens that are about to go.
            keep_state(self, req, job, up_to)
            self._decline(req)
            return
        before = req.kv.cache_protected_len
        if job is not None and job.host is not None:
            self._publish_shared(req, job, up_to, **kwargs)
            return
        if job is not None and job.asked.repeated:
            up_to = job.publishes(up_to)
            if up_to <= before:
                self._decline(req)
                return
        self._publish(req, job, up_to, **kwargs)
        after = req.kv.cache_protected_len
        row = req.kv.req_pool_idx
        if row is None or after == before:
            return
        self.token_to_kv_pool_allocator.accounting.adopt(self.req_to_token_pool.req_to_token[row, before:after].long())
        # Where another request published the same tokens first, the row now names that request's slots.
        self.row_listener(row)

    def _publish(self, req: Req, job: CompressionJob | None, up_to: int, **kwargs: Any) -> None:
        """As SGLang does; where a state of the prompt was kept on the way, with a node that ends there."""
        if job is not None and job.state is not None:
            end = job.state.end
            if req.kv.cache_protected_len < end <= up_to:
                super().checkpoint_into_tree(req, up_to=end, **kwargs)
            drop_state(self, job)
            if end == up_to:
                self._decline(req)
                return
        super().checkpoint_into_tree(req, up_to=up_to, **kwargs)

    def _decline(self, req: Req) -> None:
        """Nothing of a request is published: the state of one that has ended goes back, as SGLang does it there."""
        if req.finished():
            super().on_release(req, checkpointed=False)

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        job = job_of(req)
        if job is not None:
            drop_state(self, job)

    def _publish_shared(self, req: Req, job: CompressionJob, up_to: int, **kwargs: Any) -> None:
        """Publish what host memory holds of a prompt, under the slots that its row named before it had its own.

        Answers are not published: their keys and values depend on what the request keeps.
        """
        share, before = job.host, req.kv.cache_protected_len
        assert share is not None
        if share.detached:
            self._decline(req)
            return
        up_to = min(up_to, job.asked.length)
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        if share.own is not None:
            row[: job.asked.length] = share.own.shared.to(row.dtype)
        if share.unwritten or up_to <= before:
            self._decline(req)
        else:
            self._publish(req, job, up_to, **kwargs)
            self.token_to_kv_pool_allocator.accounting.adopt(row[before : req.kv.cache_protected_len].long())
        if share.own is None:
            return
        named = row[: job.asked.length]
        if job.area is None:
            self._detach(req, share, named)
            return
        # What comes back while the answer is decoded is read in the tree's slots, which stay locked.  Where another
        # request published the same tokens first, they are that request's.
        share.own.shared = named.to(torch.int64)
        named[:] = share.own.private.to(row.dtype)

    def _detach(self, req: Req, share: HostShare, row: torch.Tensor) -> None:
        """From now on `req` relies on its own slots only: host memory may need the room of its prompt while it decodes.

        Args:
            row: `[length]`, what names the prompt's slots.
        """
        own, share.own, share.detached = share.own, None, True
        assert own is not None
        if (left := row[req.kv.cache_protected_len :].long()).numel():
            self.token_to_kv_pool_allocator.free(left)
        row[:] = own.private.to(row.dtype)
        self.unlock(req.lock)
        req.lock, req.kv.cache_protected_len = None, 0

    def claim_kv_row(self, req: Req) -> bool:
        """Before SGLang gives back what a request holds that has not been detached: its row names the slots again that
        it named at first."""
        job = job_of(req)
        if job is not None and job.host is not None and job.host.own is not None:
            own, job.host.own = job.host.own, None
            row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
            row[: job.asked.length] = own.shared.to(row.dtype)
            self.token_to_kv_pool_allocator.free(own.private)
        claimed: bool = super().claim_kv_row(req)
        return claimed

    row_listener: Any = staticmethod(lambda row: None)
    """Called with the number of a `req_to_token` row whose slots have changed."""

    def inc_lock_ref(self, node_id: Any, skip_lock_components: Sequence[Any] = ()) -> Any:
        result = super().inc_lock_ref(node_id, skip_lock_components)
        if ComponentType.FULL not in skip_lock_components:
            self._count_lock(node_id, 1)
        return result

    def dec_lock_ref(self, node_id: Any, params: Any, skip_swa: bool = False) -> Any:
        # Counted first: afterwards the node may be gone.
        if ComponentType.FULL not in params.skipped_lock_components:
            self._count_lock(node_id, -1)
        return super().dec_lock_ref(node_id, params, skip_swa)

    def _count_lock(self, node_id: Any, delta: int) -> None:
        if self.disable:
            return
        slots = self.path_device_indices(node_id)
        if slots.numel():
            self.token_to_kv_pool_allocator.accounting.lock(slots, delta)

    removals = 0
    """Changes whenever the tree has dropped something: what was found in it is there as long as this stays."""

    def _evict(self, *args: Any, **kwargs: Any) -> Any:
        self.removals += 1
        return super()._evict(*args, **kwargs)

    def reset(self) -> None:
        self.removals += 1
        super().reset()
        self.token_to_kv_pool_allocator.accounting.forget_tree()
