"""When work that is queued on a device has been done."""

from __future__ import annotations

from typing import Any

import torch


def passed_event(device: torch.device) -> Any | None:
    """An event behind all that is queued on the current stream; None on a CPU, where everything has happened."""
    if device.type == "cpu":
        return None
    event = torch.get_device_module(device).Event()
    event.record()
    return event
