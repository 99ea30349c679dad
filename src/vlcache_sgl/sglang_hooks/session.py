"""One scheduler process that compresses: owns configuration, compressor and patches, and answers what they ask."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from vlcache_sgl.api import Prompt
from vlcache_sgl.capacity import KVShape, compressed_pool
from vlcache_sgl.compression.compressor import Compressor
from vlcache_sgl.compression.sharing.images import SharedImages
from vlcache_sgl.compression.sharing.sharing import Sharing
from vlcache_sgl.config import ConfigError, KVConfig
from vlcache_sgl.counters import Counters
from vlcache_sgl.policy import PolicyError
from vlcache_sgl.scoring.job import (
    JOB_ATTRIBUTE,
    Choice,
    Choices,
    CompressionJob,
    job_of,
)
from vlcache_sgl.sglang_hooks.admission import reopen
from vlcache_sgl.sglang_hooks.compat import attention_tp, is_health_poll, slot_writers
from vlcache_sgl.sglang_hooks.expansion import Expansions
from vlcache_sgl.sglang_hooks.gate import NAMESPACE, read_request
from vlcache_sgl.sglang_hooks.host_sharing import HostSharing, host_tokens, prefix_positions
from vlcache_sgl.sglang_hooks.media import vision_runs, vision_spans
from vlcache_sgl.sglang_hooks.patching import PatchError, Patches
from vlcache_sgl.sglang_hooks.rotary import model_rotary
from vlcache_sgl.sglang_hooks.second_reading import ReadingState, SecondReadings, clients_of
from vlcache_sgl.sglang_hooks.status import Status
from vlcache_sgl.sglang_hooks.weight_knobs import are_knobs, weights_of
from vlcache_sgl.weights import find_weights

logger = logging.getLogger(__name__)

REPORT_KEY = "kv_compression"
"""In the response's `meta_info`: a list with one report."""
JOBS_ATTRIBUTE = "vlcache_jobs"
"""On SGLang's ForwardBatch: one entry per request, None where nothing is to be scored."""
UNEVICTED = "|recall"
"""Ends the radix key of a request that only measures: it finds no compressed prefix, and leaves nothing behind."""
ROWS_ATTRIBUTE = "vlcache_rows"
"""On SGLang's ForwardBatch: the requests' rows of `req_to_token`, a list."""


class Session:
    """Compression in one scheduler process, between SGLang's start and its end."""

    def __init__(self, config: KVConfig) -> None:
        from vlcache_sgl.sglang_hooks.patch_points import runtime_points

        self.config = config
        self.choices = Choices(config)
        self.counters = Counters()
        self.images = SharedImages()
        self._expansions: Expansions | None = None
        self._readings: SecondReadings | None = None
        self._private = 0
        self.host: HostSharing | None = None
        self._host_tokens = 0
        self.compressor: Compressor | None = None
        self.physical_tokens = 0
        self._status: Status | None = None
        self._backend: Any = None
        self._model: Any = None
        self._ranks = 1
        self._patches = Patches(runtime_points(self))

    # -- start ------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Patch SGLang.

        Raises:
            PatchError: when a target does not exist; the server must not start then.
        """
        self._patches.install()
        self._patches.verify()

    def uninstall(self) -> None:
        """Leave SGLang as it was."""
        self._patches.uninstall()

    def check_started(self, scheduler: Any) -> None:
        """After SGLang has built everything: is it built from our parts?

        Raises:
            PatchError: naming what is not ours.
        """
        from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator
        from vlcache_sgl.sglang_hooks.prefix_tree import CompressedPrefixTree

        self._patches.verify()
        parts = {
            "the KV allocator": isinstance(scheduler.token_to_kv_pool_allocator, VirtualSlotAllocator),
            "the prefix cache": isinstance(scheduler.tree_cache, CompressedPrefixTree),
            "the attention backend": self._backend is not None
            and scheduler.tp_worker.model_runner.attn_backend is self._backend,
        }
        foreign = [name for name, ours in parts.items() if not ours]
        if foreign:
            raise PatchError(f"--kv-policy cannot serve this model: {', '.join(foreign)} is SGLang's own")
        self._expansions = Expansions(
            scheduler, self.images, self.config.guard_threshold, self.config.guard == "enforce", self.counters
        )
        self._readings = SecondReadings(scheduler)
        if self.choices.default.policy.reads_twice and scheduler.tree_cache.disable:
            raise ConfigError(f"--kv-policy {self.config.policy} needs the prefix cache: omit --disable-radix-cache")
        if self.host is not None:
            if scheduler.tree_cache.disable:
                raise ConfigError("--kv-share exact needs the prefix cache: omit --disable-radix-cache")
            self.host.attach(scheduler.tree_cache)
        scheduler.tree_cache.row_listener = self._backend.invalidate
        scheduler.tree_cache.copy_listener = self._expansions.published
        scheduler.tree_cache.reset_listener = self.images.clear
        reporter = scheduler.metrics_reporter
        labels = reporter.metrics_collector.labels if reporter.current_scheduler_metrics_enabled else None
        assert self.compressor is not None
        self._status = Status(
            self.config, self.choices, self.compressor, scheduler.token_to_kv_pool_allocator, self.images, labels
        )
        self._say_what_is_served()

    def _say_what_is_served(self) -> None:
        config = self.config
        logger.info(
            "KV cache: policy %s, budget %s, pictures shared: %s, guard: %s, model weights: %s",
            config.policy,
            config.budget,
            config.share,
            config.guard,
            "not known" if self.choices.weights is None else self.choices.weights.digest,
        )
        if config.guard == "off" and config.share == "policy" and not config.budget.keeps_all:
            logger.info(
                "What the first question about a picture kept answers others badly: --kv-profile makes copies for all "
                "questions, --kv-guard enforce brings back what is missing, --kv-share off shares nothing"
            )

    def _note_change(self) -> None:
        if self._status is not None:
            self._status.stale = True

    # -- pools ------------------------------------------------------------------------------------------------------

    def size_pools(self, config: Any, configurator: Any, *_: Any, **__: Any) -> None:
        """After SGLang has sized its pool: what it calls tokens becomes virtual slots."""
        self.refuse_model(configurator)
        stock, shape = int(config.max_total_num_tokens), self._shape(configurator)
        self._host_tokens = host_tokens(self.config.host_memory, shape, stock)
        pool = compressed_pool(
            stock,
            shape,
            self.config.overcommit_factor,
            graph_lists=configurator.device == "cuda",
            host_tokens=self._host_tokens,
        )
        self.physical_tokens = pool.physical_tokens
        config.max_total_num_tokens = pool.slots

    def refuse_model(self, configurator: Any) -> None:
        """Raise for models whose KV cache is not plain keys and values of all tokens in all layers."""
        kinds = {
            "multi-head latent attention (MLA)": configurator.use_mla_backend,
            "sliding-window attention": configurator.is_hybrid_swa,
            "linear-attention or state-space layers": configurator.mambaish_config is not None,
        }
        for kind, present in kinds.items():
            if present:
                raise ConfigError(f"--kv-policy does not support {kind}")

    def _shape(self, configurator: Any) -> KVShape:
        """What this rank stores per token."""
        from sglang.srt.runtime_context import get_parallel

        parallel = get_parallel()
        model = configurator.model_config
        heads = int(model.get_num_kv_heads(parallel.attn_tp_size, parallel.attn_dcp_size))
        return KVShape(
            layers=int(configurator.layer_info.num_effective_layers),
            kv_heads=heads,
            head_dim=int(model.head_dim),
            element_bytes=configurator.kv_cache_dtype.itemsize,
            groups=heads if self.config.head_cells else 1,
        )

    def build_pool(self, _: Callable[..., Any], configurator: Any, *, max_total_num_tokens: int, **__: Any) -> Any:
        """Instead of SGLang's token pool: the arena."""
        from vlcache_sgl.sglang_hooks.arena import KVArena

        shape = self._shape(configurator)
        return KVArena(
            num_cells=self.physical_tokens * shape.planes,
            groups=shape.groups,
            size=max_total_num_tokens,
            page_size=1,
            dtype=configurator.kv_cache_dtype,
            head_num=shape.kv_heads,
            head_dim=shape.head_dim,
            v_head_dim=configurator.model_config.v_head_dim,
            layer_num=shape.layers,
            device=configurator.device,
            enable_memory_saver=False,
            start_layer=configurator.layer_info.start_layer,
            end_layer=configurator.layer_info.end_layer,
            enable_alt_stream=False,
        )

    def build_allocator(self, _: Callable[..., Any], configurator: Any, *, token_to_kv_pool: Any, **__: Any) -> Any:
        """Instead of SGLang's slot allocator: ours, which also hands out cells."""
        from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator

        return VirtualSlotAllocator(token_to_kv_pool, physical_tokens=self.physical_tokens, need_sort=False)

    def build_tree(self, original: Callable[..., Any], ctx: Any, *, cache_class: Any = None) -> Any:
        """SGLang's tree with our class."""
        from vlcache_sgl.sglang_hooks.prefix_tree import CompressedPrefixTree

        return original(ctx, cache_class=cache_class or CompressedPrefixTree)

    def build_backend(self, name: str, model_runner: Any) -> Any:
        """Instead of SGLang's attention backend `name`."""
        from vlcache_sgl.scoring.tensor_parallel import HeadGather
        from vlcache_sgl.sglang_hooks.backend import ResidencyBackend

        if writers := slot_writers(model_runner.model):
            raise PatchError(f"--kv-policy cannot serve this model: {', '.join(writers)} was imported too early")
        group, rank, size = attention_tp(model_runner)
        self._ranks = size

        self._model = model_runner.model
        model = model_runner.model_config
        prompt = Prompt(
            length=0,
            start=0,
            vision=(),
            num_layers=int(model_runner.token_to_kv_pool.layer_num),
            num_heads=int(model.num_attention_heads),
            num_kv_heads=int(model.get_total_num_kv_heads()),
            head_dim=int(model.head_dim),
            device=torch.device(model_runner.device),
            rotary=model_rotary(model_runner.model),
        )
        self.choices.serve(prompt, size)
        try:
            # One rank looks: a file may be written while the others start, and all must decide alike.
            weights = find_weights(self.config.weights, model_runner.server_args.model_path) if rank == 0 else None
            weights = weights if group is None else group.broadcast_object(weights, src=0)
            if weights is not None:
                self.choices.use_weights(weights)
        except ValueError as error:
            raise ConfigError(f"--kv-weights: {error}") from error
        arena_bytes = model_runner.token_to_kv_pool.arena.nbytes
        try:
            sharing = Sharing(self.config, self.choices.copies, prompt, self.images, arena_bytes)
        except ValueError as error:
            raise ConfigError(f"--kv-profile: {error}") from error
        accounting = model_runner.token_to_kv_pool_allocator.accounting
        self.compressor = Compressor(prompt, HeadGather(group, rank, size), self.counters, sharing, accounting)
        self.host = HostSharing.build(
            self.config, self._host_tokens, model_runner, model_runner.token_to_kv_pool_allocator, prompt, group, rank
        )
        if self.host is not None:
            self.compressor.host = self.host.memory
        self._backend = ResidencyBackend(model_runner, self.compressor, name, prompt.num_heads // size)
        sharing.reads_decode = not self._backend.provider.on_device and not self.config.head_cells
        return self._backend

    def physical_capacity(self, original: property) -> property:
        """The longest prompt is bounded by physical tokens, however many slots there are."""

        def capacity(model_runner: Any) -> int:
            assert original.fget is not None
            held = self.physical_tokens if self.host is None else max(self.physical_tokens, self.host.most_tokens)
            return min(int(original.fget(model_runner)), held)

        return property(capacity)

    def show_physical_tokens(self, stats: Any, observer: Any) -> Any:
        """After SGLang has counted its pool in slots: usage in its logs and metrics is that of the memory.

        Free and evictable slots stay as they are: SGLang's leak checks add them up.
        """
        allocator = observer.token_to_kv_pool_allocator
        free = allocator.accounting.evictable_physical_tokens()
        used = self.physical_tokens - free
        return replace(stats, full_num_used=used, full_token_usage=used / self.physical_tokens)

    def show_physical_load(self, load: Any, *_: Any) -> Any:
        """After SGLang has described its load to routers: tokens are those of the memory."""
        if load.memory is not None:
            load.memory.token_capacity = self.physical_tokens
        load.max_total_num_tokens = self.physical_tokens
        return load

    # -- requests ---------------------------------------------------------------------------------------------------

    def admit_request(self, scheduler: Any, req: Any, *_: Any, **__: Any) -> None:
        """Before a request is queued: decide whether and how it will be compressed."""
        if (known := job_of(req)) is not None:
            known.restart()  # it was retracted
            Expansions.name(req, known)
            return
        if REPORT_KEY in (req.customized_info or {}):
            return  # the same: it is left alone
        if getattr(req, "to_finish", None) is not None:
            return
        try:
            params, choice = read_request(
                self.choices,
                req.sampling_params,
                extra_key=req.extra_key,
                length=len(req.origin_input_ids),
                stream=bool(req.stream),
            )
            if params.report == "recall":
                self._require_recall(choice)
        except (ConfigError, PolicyError) as error:
            req.set_finish_with_abort(str(error))
            return
        self._note_change()
        vision = vision_spans(req.multimodal_inputs)
        reason = None
        if choice.budget.keeps_all:
            reason = "budget"
        elif not vision and self.config.scope == "vision":
            reason = "scope"
        elif len(req.origin_input_ids) < self.config.min_tokens:
            reason = "short"
        if reason is not None:
            if not is_health_poll(req):
                self.counters.skipped(reason)
            _report(req, {"skipped": reason})
            if self.host is not None and (refused := self.host.fit(req, None)):
                req.set_finish_with_abort(refused)
            return
        positions, recall = params.report == "positions", params.report == "recall"
        job = CompressionJob(
            choice,
            vision,
            len(req.origin_input_ids),
            self.config.min_tokens,
            runs=vision_runs(req.multimodal_inputs, self._model),
            positions=positions,
            measures_recall=recall,
        )
        if choice.policy.reads_twice:
            job.reading = ReadingState()
        if choice.share == "exact" and not recall and self.host is not None and self.host.admits(job):
            self.host.begin(req, job)
        if self.host is not None and (refused := self.host.fit(req, job)):
            req.set_finish_with_abort(refused)
            return
        _report(req, job.report)
        setattr(req, JOB_ATTRIBUTE, job)
        self._name_prefix(req, job)

    def _name_prefix(self, req: Any, job: CompressionJob) -> None:
        """Give a request its namespace in the radix tree: compressed and full variants of a prefix never mix."""
        user_key, choice = req.extra_key or "", job.choice
        if job.host is not None:
            req.extra_key = f"{user_key}{NAMESPACE}exact"
            return
        job.base_key = req.extra_key = f"{user_key}{NAMESPACE}{choice.fingerprint}"
        if job.measures_recall:
            req.extra_key += UNEVICTED
            req.skip_radix_cache_insert = True
            return
        if choice.share in ("off", "exact"):  # exact: more than fits host memory
            self._private += 1
            req.extra_key = f"{job.base_key}#private{self._private}"
            req.skip_radix_cache_insert = True
        elif job.vision and job.reading is None and (choice.share == "tiered" or self.config.guard != "off"):
            job.tokens = req.origin_input_ids
            job.image = self.images.find(job.tokens, job.vision[0].end, (job.base_key, req.cache_salt))
            Expansions.name(req, job)

    def limit_hit(self, result: int, req: Any, *rest: Any) -> int:
        """After SGLang has said how much of a prompt may come from the prefix cache."""
        return result if self.host is None else self.host.limit_hit(result, req, *rest)

    def set_internal_state(self, original: Callable[..., Any], controller: Any, request: Any) -> Any:
        """Around the change of SGLang's settings while it serves: weights of the model may be among them.

        Requests that were admitted before keep what they were admitted with, and the prefixes that they leave.
        """
        if not are_knobs(request.server_args):
            return original(controller, request)
        from sglang.srt.managers.io_struct import SetInternalStateReqOutput

        try:
            weights = weights_of(request.server_args)
            self.choices.use_weights(weights)
        except ValueError as error:
            logger.warning("KV cache: model weights that cannot be used: %s", error)
            return SetInternalStateReqOutput(updated=False)
        self._note_change()
        logger.info("KV cache: model weights from now on: %s", weights.digest)
        return SetInternalStateReqOutput(updated=True)

    def _require_recall(self, choice: Choice) -> None:
        """
        Raises:
            ConfigError: where `kv_report: recall` cannot be answered; the message is for the client.
        """
        if self._backend.provider.on_device:
            raise ConfigError("kv_report recall needs a server with --attention-backend torch_native")
        if self._ranks > 1:
            raise ConfigError("kv_report recall needs a server without tensor parallelism: a rank sees its own heads")
        if choice.policy.reads_twice:
            raise ConfigError(f"kv_report recall cannot be had with {choice.policy.spec}: its prompt is read elsewhere")

    def begin_forward(self, forward_batch: Any, cls: Any, batch: Any, *_: Any, **__: Any) -> None:
        """After a ForwardBatch is built: tell the compressor which chunks it will compute."""
        if self.compressor is None:
            return
        rows = getattr(batch, "req_pool_indices_cpu", None)
        if rows is not None:
            setattr(forward_batch, ROWS_ATTRIBUTE, rows.tolist())
        if not batch.forward_mode.is_extend():
            watched = [job if job is not None and job.reads_decode else None for job in map(job_of, batch.reqs)]
            if any(watched):
                setattr(forward_batch, JOBS_ATTRIBUTE, watched)
            return
        decoding = {id(req) for req in (batch.decoding_reqs or ())}
        jobs: list[CompressionJob | None] = []
        first = 0
        for req, begin, count in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            job = job_of(req) if id(req) not in decoding else None
            if job is not None:
                self.compressor.begin_chunk(job, int(begin), int(begin) + int(count))
                if job.scoring is not None:
                    if job.host is not None and job.chunk.begin == job.shared > 0:
                        job.scoring.add_positions(prefix_positions(req, job.shared, forward_batch.positions.device))
                    job.scoring.add_positions(_positions(forward_batch, first, int(count)))
            first += int(count)
            attends = job is not None and (
                job.host is not None or job.positions or job.guard is not None or job.shared > 0 or not job.done
            )
            jobs.append(job if attends else None)
        if any(jobs):
            setattr(forward_batch, JOBS_ATTRIBUTE, jobs)

    def run_forward(self, original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kw: Any) -> Any:
        """Around the model's forward: at its end, compress the prompts that are complete."""
        if self._backend is None:
            return original(runner, forward_batch, *args, **kw)
        self._note_change()
        jobs = getattr(forward_batch, JOBS_ATTRIBUTE, None)
        scored = jobs is not None and any(job is not None and job.scoring is not None for job in jobs)
        started = time.perf_counter()
        # Handed over here, because SGLang's runners may give attention a copy of the batch without our attributes.
        rows: list[int] | None = getattr(forward_batch, ROWS_ATTRIBUTE, None)
        self._backend.jobs, self._backend.rows = jobs, rows
        table = runner.req_to_token_pool.req_to_token
        computing = (
            []
            if jobs is None or not forward_batch.forward_mode.is_extend()
            else [
                (job, table[forward_batch.req_pool_indices[number] if rows is None else rows[number]])
                for number, job in enumerate(jobs)
                if job is not None
            ]
        )
        if self.compressor is not None:
            self.compressor.stage([row[: job.chunk.begin] for job, row in computing if job.host is not None])
        try:
            result = original(runner, forward_batch, *args, **kw)
        finally:
            self._backend.jobs = self._backend.rows = None
            if self.compressor is not None:
                self.compressor.end_staging()
        if jobs is None or self.compressor is None:
            return result
        if forward_batch.forward_mode.is_decode():
            self.compressor.end_first_steps(self._backend.first_steps)
            return result
        for job, row in computing:
            self.compressor.end_chunk(job, row)
        complete = [(job, row) for job, row in computing if (job.reached or 0) >= job.end]
        for job, row in complete:
            self.compressor.finish(job, row)
        elapsed = (time.perf_counter() - started) * 1e3
        if scored:
            self.counters.prefill_ms += elapsed
        if any(job is not None and job.repeated for job in jobs):
            self.counters.second_reading_ms += elapsed
        for job, row in complete:
            if job.positions:
                self.compressor.report_positions(job, row)
        return result

    # -- between forwards -------------------------------------------------------------------------------------------

    def before_next_batch(self, _: Any, *, running_batch: Any, last_batch: Any) -> None:
        """Before SGLang chooses its next batch: send questions back that their picture's copy cannot answer."""
        if self._expansions is not None:
            self._expansions.before_next_batch(running_batch, last_batch)

    def before_prefill_result(self, _: Any, batch: Any, *__: Any) -> None:
        """Before SGLang publishes the first tokens of a prefill batch; under overlap scheduling that has been done."""
        if self._expansions is not None:
            self._expansions.judge(batch)

    def withholds(self, result: bool, req: Any, *_: Any) -> bool:
        """After SGLang has said whether what a stream has to say must wait: so must an answer that is not judged."""
        return bool(result) or (self._expansions is not None and self._expansions.withholds(req))

    def admit_prefills(self, original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
        """Around the choice of prompts to start: some memory has come back, some prompts must wait for another."""
        reopen(scheduler, running_batch)
        if self._expansions is None or self._readings is None:
            return original(scheduler, running_batch)
        with self._expansions.holding_back(), self._readings.holding_back():
            return original(scheduler, running_batch)

    def send_answers(
        self, original: Callable[..., Any], streamer: Any, reqs: Sequence[Any], *args: Any, **options: Any
    ) -> Any:
        """Around sending what `reqs` have said: only to clients, with what is known at the end of an answer only."""
        answered = clients_of(reqs)
        for req in answered:
            job = job_of(req)
            if job is None:
                continue
            if self.compressor is not None:
                self.compressor.report_shared(job)
            if not req.finished():
                continue
            if job.recall is not None:
                job.report["recall"] = job.recall.report(len(req.output_ids))
            if self._expansions is not None:
                self._expansions.note_decode(job)
        return original(streamer, answered, *args, **options)

    def fits_graph(self, result: bool, _: Any, forward_batch: Any) -> bool:
        """After SGLang has said whether a recorded decode graph serves a batch: are our buffers large enough?"""
        return bool(result) and (self._backend is None or self._backend.fits_graph(forward_batch))

    # -- the truth over HTTP ----------------------------------------------------------------------------------------

    def publish_metrics(self, *_: Any, **__: Any) -> None:
        """After SGLang has published its own figures."""
        if self._status is not None:
            self._status.publish()

    def publish_when_idle(self, *_: Any, **__: Any) -> None:
        """After SGLang's idle housekeeping, which spins: once per change."""
        if self._status is not None:
            self._status.publish_when_idle()

    def add_state(self, output: Any, *_: Any, **__: Any) -> None:
        """After SGLang has collected its internal state."""
        if self._status is not None:
            output.internal_state["kv_policy"] = self._status.state()


def _positions(forward_batch: Any, first: int, count: int) -> torch.Tensor:
    """Rotary positions of `count` tokens of the batch, `[count]` or `[3, count]`."""
    mrope = forward_batch.mrope_positions
    positions: torch.Tensor = forward_batch.positions if mrope is None else mrope
    return positions[..., first : first + count]


def _report(req: Any, report: dict[str, Any]) -> None:
    """Let the response's `meta_info` carry `report`, which may still be filled in."""
    req.customized_info = {**(req.customized_info or {}), REPORT_KEY: [report]}
