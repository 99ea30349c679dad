# mypy: disable-error-code="assignment, arg-type, override, no-any-return, no-untyped-call"
"""A pretend CUDA device: values lie on the CPU, devices are checked, every wait of the host is logged with its line.

`Tensor` claims to be on ``cuda:0``.  What PyTorch would do on a GPU decides what counts as a wait: copies to memory
that is not pinned and copies from it, reading a number, shapes that depend on values, assigning a number through an
index, events that have not passed.  Device work counts as unfinished until the host waits for its stream: the most that
a host may run ahead.

What it cannot show: races between streams, and anything that depends on time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
OURS = ("/vlcache_sgl/", "/vlcache_kernels/", "/vlcache_policies/")
READS_SIZES = (
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
)
"""Operations whose result has a shape that only the device knows."""
READS_VALUES = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::_linalg_check_errors")


@dataclasses.dataclass(frozen=True)
class Wait:
    """One wait of the host."""

    kind: str
    line: str
    """The innermost lines of ours that led to it."""


class Log:
    """What the host did since `clear`."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.operations: Counter[str] = Counter()
        self.copies: list[str] = []
        """Lines that copied between host and device, queued or not."""

    def clear(self) -> None:
        self.waits.clear()
        self.operations.clear()
        self.copies.clear()

    def wait(self, kind: str) -> None:
        self.waits.append(Wait(kind, _line()))
        Event.clock += 1

    def __str__(self) -> str:
        return "\n".join(f"{count} x {wait.kind}: {wait.line}" for wait, count in Counter(self.waits).most_common())


LOG = Log()
_pinned: list[torch.Tensor] = []


def _line() -> str:
    frames = [frame for frame in traceback.extract_stack() if any(part in frame.filename for part in OURS)]
    names = [f"{frame.filename.split('/src/')[-1].split('/wt-')[-1]}:{frame.lineno}" for frame in frames[-3:]]
    return " > ".join(names)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_pinned(tensor: torch.Tensor) -> bool:
    return any(_storage(tensor) == _storage(known) for known in _pinned)


def _on_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Tensor(torch.Tensor):
    """On the pretend device; `inner` has the values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Tensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",
        )
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def cpu(self, *_: Any) -> torch.Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        _count_copy()
        LOG.wait("tolist")
        return self.inner.tolist()

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        target, dtype, _, copy = _parse_to(args, kwargs)
        if target is None or _on_cuda(target):
            if not copy and dtype in (None, self.dtype):
                return self
            return Tensor(self.inner.to(dtype or self.dtype, copy=copy))
        _count_copy()
        LOG.wait("copy to memory that is not pinned")
        return self.inner.to(dtype or self.dtype, copy=True)

    def record_stream(self, stream: Any) -> None:
        LOG.operations["record_stream"] += 1

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor of a GPU has no numpy view")

    def __repr__(self) -> str:
        return f"pretended {self.inner!r}"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return Tensor(self.inner.clone())


def values(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor on the pretend device holds."""
    assert isinstance(tensor, Tensor)
    return tensor.inner


def _count_copy() -> None:
    LOG.copies.append(_line())


def _parse_to(args: Any, kwargs: Any) -> tuple[Any, torch.dtype | None, bool, bool]:
    """Device, type, non_blocking and copy of a call of `Tensor.to`."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    rest = list(args)
    if rest and isinstance(rest[0], torch.Tensor):
        other = rest.pop(0)
        device, dtype = other.device, other.dtype
    if rest and isinstance(rest[0], str | torch.device):
        device = rest.pop(0)
    if rest and isinstance(rest[0], torch.dtype):
        dtype = rest.pop(0)
    flags = [*rest, *[False] * (2 - len(rest))]
    return device, dtype, bool(kwargs.get("non_blocking", flags[0])), bool(kwargs.get("copy", flags[1]))


def _from_host(tensor: torch.Tensor, non_blocking: bool) -> None:
    _count_copy()
    if not non_blocking or not _is_pinned(tensor):
        LOG.wait("copy from memory that is not pinned" if not _is_pinned(tensor) else "copy that blocks")


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    """One operation: on the values, with what a GPU would have done logged."""
    flat, _ = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    ours = [value for value in tensors if isinstance(value, Tensor)]
    name = function._schema.name
    device = kwargs.get("device")
    here = bool(ours) or _on_cuda(device)
    inner_args, inner_kwargs = tree_map(_inner, args), dict(tree_map(_inner, kwargs))
    pinned = inner_kwargs.pop("pin_memory", None)
    if here and device is not None:
        inner_kwargs["device"] = "cpu"
    if here:
        LOG.operations[name] += 1
    if name == "aten::copy_":
        target, source = args[:2]
        non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if isinstance(target, Tensor) and not isinstance(source, Tensor) and source.dim():
            _from_host(source, non_blocking)
        elif isinstance(source, Tensor) and not isinstance(target, Tensor):
            _count_copy()
            if not non_blocking or not _is_pinned(target):
                LOG.wait("copy to memory that is not pinned")
        function(*inner_args, **inner_kwargs)
        return target
    if name == "aten::_to_copy" and here:
        from_host, to_host = not isinstance(args[0], Tensor), not (device is None or _on_cuda(device))
        inner_kwargs.pop("non_blocking", None)
        if from_host:
            _from_host(args[0], bool(kwargs.get("non_blocking", False)))
        elif to_host:
            _count_copy()
            LOG.wait("copy to memory that is not pinned")
        found = function(*inner_args, **inner_kwargs)
        found = found.clone() if found is inner_args[0] else found
        return found if to_host else Tensor(found)
    if not here:
        found = function(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
        if pinned:
            _pinned.append(found)
        return found
    _log_waits(name, args)
    _check_devices(name, args, tensors)
    found = function(*inner_args, **inner_kwargs)
    known = {id(value.inner): value for value in ours}
    return tree_map(
        lambda value: known.get(id(value), Tensor(value)) if isinstance(value, torch.Tensor) else value, found
    )


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Tensor) else value


def _log_waits(name: str, args: Any) -> None:
    if name in READS_VALUES or name in READS_SIZES:
        LOG.wait(name)
    if name == "aten::repeat_interleave" and len(args) == 1:
        LOG.wait(name)
    if name.startswith(("aten::index_put", "aten::_index_put")) or name == "aten::index":
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            LOG.wait("index by a mask")
        if not all(isinstance(index, Tensor) for index in indices):
            LOG.wait("index that lies on the host")
        if name != "aten::index" and not isinstance(args[2], Tensor):
            LOG.wait("a number of the host, assigned through an index")


def _check_devices(name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    if "index" in name:
        return
    foreign = [tensor for tensor in tensors if not isinstance(tensor, Tensor) and tensor.dim()]
    if foreign:
        raise RuntimeError(
            f"{name}: tensors on cuda:0 and cpu: {[tuple(tensor.shape) for tensor in foreign]}\n{_line()}"
        )


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class Event:
    """Passes when the host has waited for anything that was queued after it."""

    clock = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorded = -1

    def record(self, *_: Any) -> None:
        self.recorded = Event.clock
        STREAMS.append(("record", _current[-1], self))

    def query(self) -> bool:
        return Event.clock > self.recorded

    def synchronize(self) -> None:
        LOG.wait("event")

    def wait(self, *_: Any) -> None:
        pass


class Stream:
    """Only one thing is done with streams: they wait for each other on the device."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 1

    def synchronize(self) -> None:
        LOG.wait("stream")

    def wait_event(self, event: Event) -> None:
        STREAMS.append(("wait event", self, event))

    def wait_stream(self, other: Stream) -> None:
        STREAMS.append(("wait stream", self, other))

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


STREAMS: list[tuple[str, Stream, Any]] = []
"""What streams were told, in order: to launch a kernel of ours, to record an event, to wait for an event or stream."""
DEFAULT = Stream()
_current = [DEFAULT]


@contextlib.contextmanager
def use_stream(stream: Stream) -> Iterator[None]:
    _current.append(stream)
    try:
        yield
    finally:
        _current.pop()


class Properties:
    """An H100's."""

    name = "NVIDIA H100 80GB HBM3"
    major, minor = 9, 0
    multi_processor_count = 132
    total_memory = 80 << 30


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Triton kernel of ours: one launch and no wait; computed by its reference."""

    def convert(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **{key: convert(field, change) for key, field in fields.items()})
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(convert(field, change) for field in value))
        if isinstance(value, tuple):
            return tuple(convert(field, change) for field in value)
        return value

    def reachable(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, Tensor) and not _is_pinned(tensor) and tensor.numel():
            raise RuntimeError(f"{function.__name__} is given a tensor {tuple(tensor.shape)} of the host\n{_line()}")
        return _inner(tensor)

    def launch(*args: Any, **kwargs: Any) -> Any:
        LOG.operations[f"kernel {function.__name__}"] += 1
        STREAMS.append((function.__name__, _current[-1], None))
        args = tuple(convert(value, reachable) for value in args)
        given = kwargs.get("out")
        kwargs = {key: convert(value, reachable) for key, value in kwargs.items()}
        found = function(*args, **{**kwargs, "backend": "naive"})
        return given if given is not None else convert(found, lambda x: x if isinstance(x, Tensor) else Tensor(x))

    return launch


KERNELS = {
    "vlcache_sgl.policy.plan": ["select"],
    "vlcache_sgl.memory.residency": ["free_list"],
    "vlcache_sgl.memory.host_pool": ["free_list", "copy_cells"],
    "vlcache_sgl.attention.flashinfer_kernels": ["write_schedules"],
    "vlcache_sgl.attention.warm_up": [
        "append_tokens",
        "arena_write",
        "batch_attention_stats",
        "copy_cells",
        "free_list",
        "select",
    ],
    "vlcache_sgl.recall.sketch": ["sketch_scores"],
    "vlcache_sgl.scoring.batch": ["batch_attention_stats"],
    "vlcache_sgl.sglang_hooks.backend": ["arena_write"],
    "vlcache_sgl.memory.device_index": ["residency_index", "append_tokens"],
    "vlcache_sgl.memory.window_index": ["residency_index"],
}
"""Where our kernels are launched."""


@contextlib.contextmanager
def pretend_gpu() -> Iterator[Log]:
    """Inside, ``device="cuda"`` is the pretend device."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        real_to = torch.Tensor.to

        def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if isinstance(self, Tensor):
                return Tensor.to(self, *args, **kwargs)
            device, dtype, non_blocking, _ = _parse_to(args, kwargs)
            if not _on_cuda(device):
                return real_to(self, *args, **kwargs)
            _from_host(self, non_blocking)
            return Tensor(real_to(self, dtype or self.dtype, copy=True))

        def pin(self: torch.Tensor, *_: Any) -> torch.Tensor:
            copy = self.clone()
            _pinned.append(copy)
            return copy

        patch.setattr(torch.Tensor, "to", to)
        patch.setattr(torch.Tensor, "pin_memory", pin)
        patch.setattr(torch.Tensor, "is_pinned", lambda self, *_: _is_pinned(self))
        cuda = {
            "_lazy_init": lambda: None,
            "Event": Event,
            "Stream": Stream,
            "stream": use_stream,
            "current_stream": lambda *_: _current[-1],
            "synchronize": lambda *_: LOG.wait("device"),
            "get_device_properties": lambda *_: Properties,
        }
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        for place, names in KERNELS.items():
            module = importlib.import_module(place)
            for name in names:
                patch.setattr(module, name, _kernel(getattr(module, name)))
        LOG.clear()
        STREAMS.clear()
        with _Mode():
            yield LOG
    _pinned.clear()
