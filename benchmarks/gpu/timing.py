"""Times on a GPU, and the record that keeps every sample.

On a CPU (a dry run) the same functions use the host's clock, so that the program around them can be tested; such
numbers say nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

# One measurement: enough samples for a median, and an end to it.
MAX_SAMPLES = 30
MAX_SECONDS = 1.0
WARM_UP = 2


@dataclass(frozen=True)
class Measurement:
    """One timed operation; `samples` are milliseconds of one call."""

    case: str
    """Letter of the benchmark: copy, a, b, c, d."""
    name: str
    parameters: dict[str, Any]
    samples: list[float] = field(default_factory=list)
    bytes_moved: int | None = None
    """Fewest bytes of one call through device memory."""
    skipped: str | None = None
    """Why there are no samples."""
    graph: bool = False
    """Whether the calls were replayed from a CUDA graph (no launch gaps)."""

    @property
    def ms(self) -> float | None:
        return median(self.samples) if self.samples else None

    @property
    def gb_per_s(self) -> float | None:
        return None if self.bytes_moved is None or not self.samples else self.bytes_moved / median(self.samples) / 1e6


class Clock:
    """Time that is left for the whole run."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def samples_of(
    calls: Sequence[Callable[[], object]], *, graph: bool = True, max_samples: int = MAX_SAMPLES
) -> tuple[list[float], bool]:
    """Milliseconds per call, and whether a CUDA graph was replayed.

    Args:
        calls: the same operation on different inputs, taken in turn: give as many as make their data several times the
            L2 cache, or the cache is measured.
        graph: replay all calls from one graph; where an operation cannot be captured, it is launched instead.
        max_samples: at most this many.
    """
    if not torch.cuda.is_available():
        return _host_samples(calls, min(max_samples, 2)), False
    for _ in range(WARM_UP):
        for call in calls:
            call()
    torch.cuda.synchronize()
    replay = _capture(calls) if graph else None

    def every_call() -> None:
        for call in calls:
            call()

    run = replay or every_call
    samples: list[float] = []
    began = time.monotonic()
    while len(samples) < 3 or (len(samples) < max_samples and time.monotonic() - began < MAX_SECONDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / len(calls))
    return samples, replay is not None


def _capture(calls: Sequence[Callable[[], object]]) -> Callable[[], None] | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _host_samples(calls: Sequence[Callable[[], object]], count: int) -> list[float]:
    samples = []
    for _ in range(count):
        began = time.perf_counter()
        for call in calls:
            call()
        samples.append((time.perf_counter() - began) * 1e3 / len(calls))
    return samples


def copy_bandwidth(device: torch.device, size: int) -> Measurement:
    """A device-to-device copy of `size` bytes, read and written both counted: the ceiling that others are held to."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    # Not from a graph: there it was 2.7 TB/s on an H200, of 4.4 TB/s at which attention reads there.
    samples, graph = samples_of([lambda: target.copy_(source)], graph=False)
    return Measurement("copy", "device to device copy", {"bytes": size}, samples, 2 * size, graph=graph)
