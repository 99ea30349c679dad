"""What is queued on a device: when it has been done, in which order streams do it, and copies that nobody waits for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def passed_event(device: torch.device) -> Any | None:
    """An event behind all that is queued on the current stream; None on a CPU, where everything has happened."""
    if device.type == "cpu":
        return None
    event = torch.get_device_module(device).Event()
    event.record()
    return event


class StreamOrder:
    """Lets streams touch one piece of memory in the order in which the host asks for it; the host never waits.

    Args:
        device: where the memory is; on a CPU there is nothing to order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: tuple[Any, Any] | None = None

    @contextlib.contextmanager
    def next(self) -> Iterator[None]:
        """Around operations that are queued on the current stream: they run behind those of the block before."""
        if self._device.type == "cpu":
            yield
            return
        stream = torch.get_device_module(self._device).current_stream()
        if self._last is not None and self._last[0] != stream:
            stream.wait_event(self._last[1])
        yield
        self._last = (stream, passed_event(self._device))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in host memory, complete when an event behind this has passed; the host does not wait."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Arriving:
    """A tensor on its way to the host.

    Args:
        tensor: on any device.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._value = to_host(tensor)
        self._done = passed_event(tensor.device)

    def value(self) -> torch.Tensor:
        """The tensor on the host; waits if it has not arrived."""
        if self._done is not None and not self._done.query():
            self._done.synchronize()
        return self._value


def to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`numbers` of the host on `device`; the host does not wait."""
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)
