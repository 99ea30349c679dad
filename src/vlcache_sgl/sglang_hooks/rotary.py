"""The served model's rotary embedding, for policies that undo or redo it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from vlcache_sgl.sglang_hooks.attention_kinds import attention_layers


class ModelRotary:
    """`vlcache_sgl.api.Rotary` over one of SGLang's rotary modules.

    Args:
        module: has `cos_sin_cache` `[positions, rotary_dim]` (cosines, then sines) and `is_neox_style`; with M-RoPE
            also `mrope_section` and `mrope_interleaved`.
    """

    def __init__(self, module: Any) -> None:
        self._cache: torch.Tensor = module.cos_sin_cache
        self._neox = bool(module.is_neox_style)
        self._sections = list(getattr(module, "mrope_section", None) or ())
        self._interleaved = bool(getattr(module, "mrope_interleaved", False))

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """`x` `[..., T, D]` rotated to `positions` `[T]` (text) or `[3, T]` (M-RoPE); same dtype."""
        cos, sin = self._cache[positions].float().chunk(2, dim=-1)
        if positions.dim() == 2:
            cos, sin = self._merge(cos), self._merge(sin)
        if inverse:
            sin = -sin
        width = 2 * cos.shape[-1]
        turned, rest = x[..., :width].float(), x[..., width:]
        if self._neox:
            a, b = turned.chunk(2, dim=-1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([turned.to(x.dtype), rest], dim=-1)

    def _merge(self, x: torch.Tensor) -> torch.Tensor:
        """`[3, T, D/2]` -> `[T, D/2]`: each frequency follows time, height or width."""
        if self._interleaved:
            merged = x[0].clone()
            for axis in (1, 2):
                columns = slice(axis, self._sections[axis] * 3, 3)
                merged[:, columns] = x[axis][:, columns]
            return merged
        return torch.cat([part[axis] for axis, part in enumerate(torch.split(x, self._sections, dim=-1))], dim=-1)


def model_rotary(model: torch.nn.Module, kept: Collection[int] = ()) -> ModelRotary | None:
    """The rotary embedding of the language model's attention; None when there is no table of cosines.

    Args:
        kept: numbers of the layers that it is to be of: layers with a window may have another.
    """
    for _, layer, owner in attention_layers(model):
        if layer.layer_id in kept and (own := _with_table(owner)) is not None:
            return ModelRotary(own)
    for name, module in model.named_modules():
        if "visual" not in name and "vision" not in name and hasattr(module, "cos_sin_cache"):
            return ModelRotary(module)
    return None


def _with_table(owner: torch.nn.Module) -> torch.nn.Module | None:
    return next((module for module in owner.modules() if hasattr(module, "cos_sin_cache")), None)
