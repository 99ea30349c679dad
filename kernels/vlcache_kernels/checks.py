"""Argument checks shared by the dispatchers: every message names the tensor, what it is and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Backend = Literal["auto", "naive", "triton"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INDEXES = (torch.int32, torch.int64)


def check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int | None]) -> None:
    """`shape` holds expected sizes, None where any size will do."""
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")


def check_float(name: str, tensor: torch.Tensor) -> None:
    """Refuse what is no number as a model computes it."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16")


def check_cells(name: str, tensor: torch.Tensor) -> None:
    """Refuse what cells do not hold; they also hold 8-bit floats, whose scales are arguments of their own."""
    if tensor.dtype not in (*FLOATS, *FP8):
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in (*FLOATS[:3], *FP8))
        raise TypeError(f"{name} is {tensor.dtype}, expected one of: {kinds}")


def check_index(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in INDEXES:
        raise TypeError(f"{name} is {tensor.dtype}, expected int32 or int64")


def check_device(device: torch.device, **tensors: torch.Tensor | None) -> None:
    """All tensors that are given live on `device`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def use_triton(backend: Backend, device: torch.device) -> bool:
    """Whether to launch the Triton kernel: on a GPU, or where the interpreter was asked for by name."""
    if backend not in ("auto", "naive", "triton"):
        raise ValueError(f"backend {backend!r} is not one of: auto, naive, triton")
    return backend == "triton" or (backend == "auto" and device.type == "cuda")
