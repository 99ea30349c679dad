"""Policies that read a prompt twice: an internal request reads, compresses and publishes it before others start.

What is read twice is the *prefix* of a request: the prompt up to the end of its last image, or all but the last token
of one without images.  The *reader* is a request without a client.  Its tokens are the prefix, a request to repeat it,
and the prefix again from its first image on; images are embedded a second time.  Rows behind the prefix are the query
rows, tokens of the prefix are evicted, and only the prefix is published.  Requests that need it wait meanwhile in
SGLang's queue, where an abort finds them, and then find it in the prefix tree like any later question.

A reader is admitted, chunked, retracted and batched as any request, hence costs what a prompt of twice the length does.
Every tensor-parallel rank makes the same readers, because all ranks have the same queue and tree.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req as SGLangReq
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.sampling.sampling_params import SamplingParams

from vlcache_sgl.api import Span
from vlcache_sgl.capacity import longest_answer
from vlcache_sgl.compression.job import CompressionJob, ReadingState
from vlcache_sgl.scoring.asked import Asked
from vlcache_sgl.sglang_hooks.admission import set_aside
from vlcache_sgl.sglang_hooks.facades import MediaItem, MultimodalInputs, Req, Scheduler
from vlcache_sgl.sglang_hooks.jobs import give_job, job_of

logger = logging.getLogger(__name__)

REQUEST = "\n\nRepeat the previous context exactly."
"""Stands between the two readings."""
UNREAD = "|unread"
"""Ends the radix key of requests whose prefix could not be read twice: what they publish is whole."""
MAX_TRIES = 2
"""Readings that a request waits for; the prefix tree may drop a prefix before the request has started."""


class Unreadable(Exception):
    """A prefix that cannot be read twice; the message says why."""


def is_reader(req: Req) -> bool:
    """Whether `req` is internal: nobody waits for its answer."""
    job = job_of(req)
    return job is not None and job.asked.repeated > 0


class SecondReadings:
    """Makes readers and lets requests wait for them, on the scheduler's side.

    Args:
        scheduler: SGLang's.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._readers: dict[tuple[Any, ...], Any] = {}
        self._made = 0
        tokenizer = scheduler.tokenizer
        ids = () if tokenizer is None else tokenizer.encode(REQUEST, add_special_tokens=False)
        self._request = array("q", ids)

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        """While SGLang chooses whom to start: requests whose prefix is being read are out of its queue."""
        with set_aside(self._scheduler, self.held()):
            yield

    def held(self) -> list[Req]:
        """Waiting requests that must not start yet; makes the readers that are missing."""
        queue = list(self._scheduler.waiting_queue)
        waiting = {id(req) for req in queue}
        self._readers = {key: req for key, req in self._readers.items() if _lives(req, waiting)}
        held = []
        for req in queue:
            job = job_of(req)
            if job is not None and job.reading is not None and self._waits(req, job, job.reading):
                held.append(req)
        return held

    def _waits(self, req: Req, job: CompressionJob, state: ReadingState) -> bool:
        if state.given_up:
            return False
        if state.reader is not None and self._readers.get(state.key) is state.reader:
            return True
        tree = self._scheduler.tree_cache
        if state.found_at == tree.removals:
            return False
        reader, state.reader = state.reader, None
        end = job.asked.images_end or len(req.origin_input_ids) - 1
        found = self._found(req, end)
        done = None if reader is None else job_of(reader)
        if end - found < job.asked.min_tokens:
            state.found_at = tree.removals
            if done is not None and done.progress.compressed:
                state.report = dict(done.report.fields)
            return False
        try:
            if done is not None and not done.progress.compressed:
                raise Unreadable(done.report.fields.get("failed", "it was aborted"))
            if state.tries == MAX_TRIES:
                raise Unreadable("the prefix cache dropped it before it was used")
            state.key = (req.extra_key, req.cache_salt, prefix_digest(req.origin_input_ids, end))
            if state.key not in self._readers:
                self._readers[state.key] = self._start(req, job, Span(found, end))
        except Unreadable as reason:
            logger.warning("a prompt of %d tokens is not read twice, and stays whole: %s", job.asked.length, reason)
            policy = job.asked.choice.policy.spec
            state.report = {"policy": policy, "skipped": "second_reading", "second_reading": {"failed": str(reason)}}
            req.extra_key += UNREAD
            return False
        state.reader = self._readers[state.key]
        state.tries += 1
        return True

    def _found(self, req: Req, end: int) -> int:
        """How much of the prefix of `req` the tree has."""
        key = RadixKey(req.origin_input_ids[:end], req.extra_key, cache_salt=req.cache_salt)
        return int(self._scheduler.tree_cache.match_prefix(MatchPrefixParams(key=key)).device_prefix_len)

    def _start(self, req: Req, job: CompressionJob, missing: Span) -> Any:
        """Queue a reader before `req`.

        Args:
            missing: what the tree does not have of the prefix.

        Raises:
            Unreadable: when that is not possible.
        """
        scheduler = self._scheduler
        reader = self._reader(req, job, missing)
        length = len(reader.origin_input_ids)
        physical = scheduler.token_to_kv_pool_allocator.accounting.physical_tokens
        fits = length < scheduler.max_req_input_len and longest_answer(length, 1, physical) == 1
        if fits:
            scheduler.init_req_max_new_tokens(reader)
        if not fits or reader.to_finish is not None:
            raise Unreadable(f"with the second reading it has {length} tokens, more than fit")
        queue = scheduler.waiting_queue
        queue.insert(next(place for place, other in enumerate(queue) if other is req), reader)
        reader.time_stats.set_wait_queue_entry_time()
        reader.arrival_processed_tokens = scheduler.processed_tokens_counter
        return reader

    def _reader(self, req: Req, job: CompressionJob, missing: Span) -> Any:
        if self._scheduler.tree_cache.disable:
            raise Unreadable("there is no prefix cache (--disable-radix-cache)")
        if req.input_embeds is not None or req.positional_embed_overrides is not None:
            raise Unreadable("the request brings its own embeddings")
        if req.return_logprob and 0 <= req.logprob_start_len < missing.end:
            raise Unreadable("the log-probabilities of its prompt were asked for")
        tokens, media, end = req.origin_input_ids, req.multimodal_inputs, missing.end
        again = _read_again(job, media, missing)
        # Where an image is fed again, what encloses it is, too.
        between = self._request if not job.asked.vision else tokens[end : end + 1] + self._request
        if job.asked.vision and again.begin:
            again = Span(again.begin - 1, again.end)
        ids = tokens[:end] + between + tokens[again.begin : again.end]
        self._made += 1
        sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        sampling.normalize(self._scheduler.tokenizer)
        reader: Req = SGLangReq(
            f"vlcache-second-reading-{self._made}",
            "",
            ids,
            sampling,
            lora_id=req.lora_id,
            eos_token_ids=req.eos_token_ids,
            vocab_size=req.vocab_size,
            priority=req.priority,
            disagg_mode=self._scheduler.disaggregation_mode,
            http_worker_ipc=req.http_worker_ipc,
            cache_salt=req.cache_salt,
        )
        reader.extra_key = req.extra_key
        reader.logprob_start_len = -1
        reader.tokenizer = self._scheduler.tokenizer
        if media is not None:
            reader.multimodal_inputs = repeat_media(media, again, len(between))
        asked = Asked(job.asked.choice, job.asked.vision, end, job.asked.min_tokens, repeated=len(ids) - end)
        give_job(reader, CompressionJob(asked))
        return reader


def prefix_digest(tokens: Sequence[int], end: int) -> bytes:
    """Names ``tokens[:end]``; images differ in the numbers that SGLang gives their tokens."""
    return hashlib.blake2b(array("q", tokens[:end]).tobytes(), digest_size=16).digest()


def _lives(reader: Req, waiting: set[int]) -> bool:
    """Whether a reader will still come to its end: aborted ones have left the queue without having started."""
    return not reader.finished() and (id(reader) in waiting or bool(reader.kv.holds_kv))


def _read_again(job: CompressionJob, media: MultimodalInputs | None, missing: Span) -> Span:
    """What of the prefix is read a second time: what the tree does not have, from the beginning of an image on.

    Raises:
        Unreadable: where SGLang does not say which tokens belong to what.
    """
    if media is None:
        return missing
    unplaced = any(not item.offsets for item in media.mm_items)
    if unplaced or media.token_modalities is not None or media.vision_position_ids is not None:
        raise Unreadable("this model's images cannot be fed a second time")
    if any(item.has_cuda_ipc_proxy() for item in media.mm_items):
        raise Unreadable("its images are in another process's memory")
    begin = missing.begin
    if job.asked.vision:
        begin = min(_extent(item).begin for item in media.mm_items if not item.is_audio() and _extent(item).end > begin)
    # Media that would be cut are read from their beginning.
    extents = sorted(map(_extent, media.mm_items), key=lambda extent: extent.end, reverse=True)
    for extent in extents:
        begin = min(begin, extent.begin) if extent.end > begin else begin
    return Span(begin, missing.end)


def _extent(item: MediaItem) -> Span:
    """From the first token of a medium to its last."""
    return Span(int(min(begin for begin, _ in item.offsets)), int(max(last for _, last in item.offsets)) + 1)


def repeat_media(media: Any, again: Span, between: int) -> Any:
    """SGLang's multimodal inputs of a prompt ``[0, again.end)``, `between` tokens of text, and `again` once more.

    The features are the same tensors; releasing them leaves those of `media` alone.  Positions go on behind the first
    reading.
    """
    items = [_copy(item, 0) for item in media.mm_items if _extent(item).begin < again.end]
    shift = again.end + between - again.begin
    items += [_copy(item, shift) for item in items if _extent(item).end > again.begin]
    repeated = replace(media, mm_items=items, padded_input_ids=None, mrope_position_delta_repeated_cache=None)
    if media.mrope_positions is not None:
        positions = repeat_positions(media.mrope_positions, again, between)
        repeated.mrope_positions = positions
        repeated.mrope_position_delta = (positions.max() + 1 - positions.shape[1]).reshape(1, 1)
    return repeated


def repeat_positions(positions: torch.Tensor, again: Span, between: int) -> torch.Tensor:
    """M-RoPE positions `[3, n]` of a prompt -> `[3, again.end + between + len(again)]` of both readings."""
    first = positions[:, : again.end]
    following = int(first.max()) + 1 + torch.arange(between, dtype=first.dtype, device=first.device)
    second = first[:, again.begin :]
    second = second - second.min() + int(first.max()) + 1 + between
    return torch.cat([first, following.expand(3, -1), second], dim=1)


def _copy(item: MediaItem, shift: int) -> Any:
    """A medium with features of its own to release, `shift` tokens further on."""
    copied = copy.copy(item)
    copied.model_specific_data = dict(item.model_specific_data)
    copied.offsets = [(int(begin) + shift, int(last) + shift) for begin, last in item.offsets]
    return copied


def clients_of(reqs: Sequence[Req]) -> list[Req]:
    """Those of `reqs` that somebody waits for."""
    return [req for req in reqs if not is_reader(req)]
