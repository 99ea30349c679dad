"""The benchmarks: (a) statistics, (b) decode attention, (c) residency index, (d) selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.decode import providers
from benchmarks.gpu.sizes import Model, Sizes
from benchmarks.gpu.timing import Clock, Measurement, samples_of
from vlcache_kernels.attention_stats import ResidencyIndex, RowBatch, StatsRequest, batch_attention_stats
from vlcache_kernels.residency_index import append_tokens, residency_index
from vlcache_kernels.select import free_list, select

DTYPE = torch.bfloat16
# What VL-Cache asks for, and what a scorer without layer budgets asks for where the attention has left its LSE.
WANTED = {"column sums and density": StatsRequest(column_sum=True, density=0.01)}
WANTED_WITH_LSE = {"column sums, given LSE": StatsRequest(column_sum=True)}


def copies(size: int, at_least: int) -> int:
    """How many input sets of `size` bytes make `at_least`; no more than 16."""
    return max(1, min(16, math.ceil(at_least / max(1, size))))


def layer_budgets(layers: int, ratio: float) -> list[float]:
    """Ragged shares whose mean is `ratio`: dense first layers, an uneven rest, as VL-Cache finds them."""
    if ratio >= 1.0:
        return [1.0] * layers
    weights = [2.0 if layer < 2 else 0.6 + 0.25 * (layer * 7 % 5) / 2 for layer in range(layers)]
    mean = sum(weights) / layers
    return [min(1.0, ratio * weight / mean) for weight in weights]


# --- (a) -------------------------------------------------------------------------------------------------------------


def statistics(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Measurement]:
    """Prefill attention of one layer, then the statistics of the last rows of the same layer."""
    for model in sizes.models:
        for keys in sizes.prompts:
            parameters = {"model": model.name, "keys": keys, "rows": sizes.rows}
            # Causal attention in bf16 at 300 TFLOP/s, four times over, and the inputs.
            needed = 4 * 2 * keys**2 * model.heads * model.head_dim / 300e12 + 2
            if clock.left() < needed:
                yield Measurement("a", "prefill attention", parameters, skipped="out of time")
                continue
            yield _prefill(model, keys, parameters, device)
            for name, want in (WANTED | WANTED_WITH_LSE).items():
                yield _statistics(model, keys, name, want, name in WANTED_WITH_LSE, parameters, sizes, device)


def _prefill(model: Model, keys: int, parameters: dict[str, object], device: torch.device) -> Measurement:
    q = torch.randn(1, model.heads, keys, model.head_dim, device=device).to(DTYPE)
    k, v = (torch.randn(1, model.kv_heads, keys, model.head_dim, device=device).to(DTYPE) for _ in range(2))

    def attend() -> torch.Tensor:
        # On a GPU only kernels that do not store the scores: the fallback would need hundreds of GB.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]) if q.is_cuda else nullcontext():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    samples, graph = samples_of([attend], max_samples=10)
    return Measurement("a", "prefill attention", parameters, samples, graph=graph)


def _statistics(
    model: Model,
    keys: int,
    name: str,
    want: StatsRequest,
    given_lse: bool,
    parameters: dict[str, object],
    sizes: Sizes,
    device: torch.device,
) -> Measurement:
    read = keys * model.kv_heads * model.head_dim * DTYPE.itemsize
    sets = copies(2 * read, sizes.cache_bytes)
    arena = torch.empty(sets * keys, 2, model.kv_heads, model.head_dim, dtype=DTYPE, device=device).normal_()
    order = torch.randperm(sets * keys, device=device).to(torch.int32).view(sets, keys)
    indptr = torch.tensor([0, keys], dtype=torch.int32, device=device)
    queries = torch.randn(sizes.rows, model.heads, model.head_dim, device=device).to(DTYPE)
    row_index = torch.arange(keys - sizes.rows, keys, device=device)
    batch = RowBatch.build((sizes.rows,), (keys,), (keys,), device)
    lse = torch.full((model.heads, sizes.rows), math.log(keys), device=device) if given_lse else None

    def call(cells: torch.Tensor) -> Callable[[], object]:
        index = ResidencyIndex(indptr, cells)
        scale = model.head_dim**-0.5
        return lambda: batch_attention_stats(
            queries, row_index, arena, index, batch, scale, want=want, lse=lse, backend="triton"
        )

    samples, graph = samples_of([call(cells) for cells in order])
    passes = 1 if given_lse else 2
    return Measurement("a", name, parameters, samples, passes * (read + 4 * keys), graph=graph)


# --- (b) -------------------------------------------------------------------------------------------------------------


def decode(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Measurement]:
    """One decode step's attention, averaged over layers of different lengths, and a layer's linear part.

    As many layers as fit into `arena_bytes` at budget 1.0 are measured, the same ones at every budget.
    """
    for model in sizes.models:
        cell = 2 * model.kv_heads * model.head_dim * DTYPE.itemsize
        fitting = sizes.arena_bytes // (cell * sizes.context)
        arena = torch.empty(0, device=device)
        for batch in sizes.batches:
            parameters = {"model": model.name, "context": sizes.context, "batch": batch}
            if clock.left() < 10:
                yield Measurement("b", "linear layers", parameters, skipped="out of time")
                continue
            yield _linear(model, batch, parameters, sizes, device)
            layers = max(1, min(model.layers, fitting // batch))
            if arena.shape[0] < layers * batch * sizes.context:
                del arena
                arena = torch.empty(
                    layers * batch * sizes.context, 2, model.kv_heads, model.head_dim, dtype=DTYPE, device=device
                ).normal_()
            for budget in sizes.budgets:
                yield from _decode(model, batch, layers, budget, arena, parameters, sizes, device)
        del arena


def _linear(model: Model, batch: int, parameters: dict[str, object], sizes: Sizes, device: torch.device) -> Measurement:
    """The matrix products of one decoder layer, so that shares of a whole decode step can be told."""
    size = sum(out * width * DTYPE.itemsize for out, width in model.linears())
    sets = copies(size, sizes.cache_bytes)
    calls = []
    for _ in range(sets):
        weights = [torch.empty(shape, dtype=DTYPE, device=device).normal_(std=0.02) for shape in model.linears()]
        inputs = [torch.randn(batch, width, device=device).to(DTYPE) for _, width in model.linears()]
        calls.append(lambda w=weights, x=inputs: [torch.nn.functional.linear(a, b) for a, b in zip(x, w, strict=True)])
    samples, graph = samples_of(calls)
    return Measurement("b", "linear layers", parameters, samples, size, graph=graph)


def _decode(
    model: Model,
    batch: int,
    layers: int,
    budget: float,
    arena: torch.Tensor,
    parameters: dict[str, object],
    sizes: Sizes,
    device: torch.device,
) -> Iterator[Measurement]:
    cells = torch.randperm(arena.shape[0], device=device).to(torch.int32)
    queries = torch.randn(batch, model.heads, model.head_dim, device=device).to(DTYPE)
    lists = []
    begin = 0
    for share in layer_budgets(layers, budget):
        kept = max(1, round(share * sizes.context))
        indptr = torch.arange(0, (batch + 1) * kept, kept, dtype=torch.int32, device=device)
        lists.append((indptr, cells[begin : begin + batch * kept], kept))
        begin += batch * kept
    per_cell = 2 * model.kv_heads * model.head_dim * DTYPE.itemsize + 4
    parameters = parameters | {"budget": budget, "layers_measured": layers}
    for name, provider in providers().items():
        label = f"decode attention, {name}"
        try:
            calls = [provider(queries, arena, *one) for one in lists]
            samples, graph = samples_of(calls)
        except Exception as error:  # a library that does not run here is a finding, not the end of the check
            if name == "triton":
                raise
            yield Measurement("b", label, parameters, skipped=f"{type(error).__name__}: {str(error)[:200]}")
            continue
        yield Measurement("b", label, parameters, samples, begin * per_cell // layers, graph=graph)


# --- (c) -------------------------------------------------------------------------------------------------------------


def index(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Measurement]:
    """The index of all layers for one decode step: built from residency, and carried over from the step before."""
    for model in sizes.models:
        for batch in sizes.batches:
            for budget in sizes.index_budgets:
                parameters = {"model": model.name, "context": sizes.context, "batch": batch, "budget": budget}
                if clock.left() < 4:
                    yield Measurement("c", "build", parameters, skipped="out of time")
                    continue
                yield from _index(model, batch, budget, parameters, sizes, device)


def _index(
    model: Model, batch: int, budget: float, parameters: dict[str, object], sizes: Sizes, device: torch.device
) -> Iterator[Measurement]:
    n, layers = sizes.context, model.layers
    slots = (torch.randperm(batch * n, device=device) + 1).to(torch.int32)
    rows, lengths = torch.arange(batch, device=device), torch.full((batch,), n, dtype=torch.int32, device=device)
    residency = torch.zeros(layers, batch * n + 1, dtype=torch.int32, device=device)
    for layer, share in enumerate(layer_budgets(layers, budget)):
        kept = torch.rand(batch * n + 1, device=device) < share
        residency[layer] = torch.where(kept, torch.arange(batch * n + 1, device=device, dtype=torch.int32), -1)
    kept_cells = int((residency[:, 1:] >= 0).sum())
    longest = int((residency[:, 1:] >= 0).sum(1).max())
    built, grown = (ResidencyIndex.allocate(layers, batch, longest + batch, device) for _ in range(2))

    def build() -> None:
        residency_index(slots.view(batch, n), rows, lengths, residency, out=built, max_length=n, backend="triton")

    samples, graph = samples_of([build])
    moved = layers * batch * n * 2 * (4 + 4) + 4 * kept_cells
    yield Measurement("c", "build", parameters, samples, moved, graph=graph)

    new = slots.view(batch, n)[:, -1]
    source = torch.arange(batch, device=device)
    segment = int((built.indptr[:, 1:] - built.indptr[:, :-1]).max()) + 1

    def append() -> None:
        append_tokens(built, new, residency, source=source, out=grown, max_length=segment, backend="triton")

    samples, graph = samples_of([append])
    yield Measurement("c", "append", parameters, samples, 8 * kept_cells, graph=graph)


# --- (d) -------------------------------------------------------------------------------------------------------------


def selection(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Measurement]:
    """All layers' selection at 10 %, against what torch offers: one k for all layers, or a whole sort."""
    for owned in sizes.prompts:
        layers = sizes.models[0].layers
        parameters = {"planes": layers, "tokens": owned, "kept": 0.1}
        if clock.left() < 4:
            yield Measurement("d", "select and free list", parameters, skipped="out of time")
            continue
        scores = torch.rand(layers, owned, device=device)
        counts = [max(1, round(share * owned)) for share in layer_budgets(layers, 0.1)]
        k = torch.tensor(counts, device=device)
        cells = torch.arange(layers * owned, dtype=torch.int32, device=device).view(layers, owned)
        tiers = torch.zeros(owned, dtype=torch.int8, device=device)
        tiers[-32:] = 1

        def ours(
            scores: torch.Tensor = scores, k: torch.Tensor = k, tiers: torch.Tensor = tiers, cells: torch.Tensor = cells
        ) -> object:
            keep = select(scores, k, tiers=tiers, backend="triton").keep
            return free_list(keep, cells, backend="triton")

        def top_k(scores: torch.Tensor = scores, most: int = max(counts)) -> object:
            return torch.topk(scores, most, sorted=False)

        def sort(scores: torch.Tensor = scores) -> object:
            return torch.sort(scores, descending=True, stable=True)

        for name, call in (("select and free list", ours), ("torch.topk, one k", top_k), ("torch.sort, stable", sort)):
            samples, graph = samples_of([call])
            yield Measurement("d", name, parameters, samples, 4 * layers * owned, graph=graph)
