"""Hybrids: states of linear-attention layers behind a prompt's last image, so that another question finds the image.

SGLang's tree keeps a state at the end of a node, and a hit goes as far as a node with one.  A state at the end of a
prompt is of no use to a question that differs from it: what both share ends behind the image.  So the state there is
kept as well, by the ways that SGLang has (``--mamba-radix-cache-strategy``):

* ``no_buffer``: a request has one state, behind its last computed token.  Its prompt is cut behind the image into two
  chunks (`tokens_to_image_end`), and between them the state is copied.
* ``extra_buffer``: a forward leaves a copy of the state behind one token of each prompt, a multiple of 64 tokens from
  where the forward begins, and SGLang has a name for where it should be: the branching point.  It is the last such
  place before the end of the image (`choose_branching_point`).

A compressed prompt is not published between its chunks, so the copy waits at its job and is given to the tree with it.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.runtime_context import mamba_checkpoint_grid

from vlcache_sgl.compression.job import CompressionJob, KeptState
from vlcache_sgl.sglang_hooks.facades import Req
from vlcache_sgl.sglang_hooks.jobs import job_of


def image_end(tree: Any, req: Req) -> int | None:
    """Where the last image or video of a prompt that is compressed ends; None where nobody else will look for it."""
    job = job_of(req)
    if job is None or not job.asked.vision or not tree.supports_mamba() or tree.disable or req.skip_radix_cache_insert:
        return None
    shared = job.host is not None or job.asked.choice.share == "policy"
    return job.asked.vision[-1].end if shared else None


def tokens_to_image_end(tree: Any, req: Req) -> int | None:
    """Tokens of the chunk with which the last image of a prompt ends, where its state can be kept there only."""
    end = image_end(tree, req)
    if end is None or tree.enable_mamba_extra_buffer:
        return None
    return end - int(req.prefix_len) if req.prefix_len < end < len(req.full_untruncated_fill_ids) else None


def choose_branching_point(batch: Any, req: Req, *_: Any) -> None:
    """Before SGLang decides behind which token of a chunk the state is copied: before the end of the image."""
    end = image_end(batch.tree_cache, req)
    if end is None:
        return
    grid = mamba_checkpoint_grid(batch.tree_cache.page_size)
    steps = (end - int(req.prefix_len)) // grid
    if steps > 0:
        req.mamba_branching_seqlen = int(req.prefix_len) + steps * grid


def keep_state(tree: Any, req: Req, job: CompressionJob, up_to: int) -> None:
    """Between two chunks of a prompt that is not published yet, the first `up_to` tokens computed: keep the state if it
    is the one behind the image."""
    end = image_end(tree, req)
    if end is None:
        return
    if tree.enable_mamba_extra_buffer:
        copied = req.kv.mamba_last_track_seqlen
        if copied is None or not copied <= end < copied + mamba_checkpoint_grid(tree.page_size):
            return
    elif up_to != end:
        return
    pool = tree.req_to_token_pool
    if pool.mamba_allocator.available_size() + tree.mamba_evictable_size() < 1:
        return  # others use all states: the image is computed again
    drop_state(tree, job)
    component, insert = tree.components[ComponentType.MAMBA], InsertParams()
    kept_end = component.prepare_for_caching_req(req=req, insert_params=insert, token_ids_len=up_to, is_finished=False)
    component.cleanup_after_caching_req(
        req, is_finished=False, insert_result=InsertResult(prefix_len=0), insert_params=insert
    )
    job.state = KeptState(kept_end, insert.mamba_value)


def drop_state(tree: Any, job: CompressionJob) -> None:
    """Give the job's state back to SGLang's pool, if it has one."""
    if job.state is not None:
        kept, job.state = job.state, None
        tree.components[ComponentType.MAMBA]._free_mamba_value(kept.slot)


def prepare_state(
    original: Any, component: Any, req: Req, insert_params: InsertParams, token_ids_len: int, is_finished: bool
) -> int | None:
    """Around SGLang's tree asking for the state behind the first `token_ids_len` tokens of a request.

    Returns:
        How many tokens the state that it gets has seen; 0: there is none that fits.
    """
    job = job_of(req)
    if job is not None and job.state is not None and job.state.end == token_ids_len:
        insert_params.mamba_value = job.state.slot
        return job.state.end
    if job is not None and not component.cache.enable_mamba_extra_buffer:
        computed = req.owned_kv_len() if is_finished else req.extend_end
        if token_ids_len != computed:
            return 0  # less is published than was computed, and the state has seen all of it
    elif job is not None and not is_finished and (req.kv.mamba_last_track_seqlen or 0) > token_ids_len:
        return 0
    seen: int | None = original(component, req, insert_params, token_ids_len, is_finished)
    return seen


def clean_up_state(
    original: Any,
    component: Any,
    req: Req,
    is_finished: bool,
    insert_result: InsertResult | None = None,
    insert_params: InsertParams | None = None,
) -> None:
    """Around SGLang's tree having inserted, or not, what it asked for in `prepare_state`."""
    job = job_of(req)
    kept = None if job is None else job.state
    if job is None or kept is None or insert_params is None or insert_params.mamba_value is not kept.slot:
        original(component, req, is_finished, insert_result, insert_params)
    elif insert_result is None or insert_result.mamba_exist:
        drop_state(component.cache, job)
    else:
        job.state = None  # the tree's
