"""The architectures of `models/matrix.toml` that are loaded with tiny random weights: each row's claims, on two servers.

Stock tokens at budget 1.0, vision tokens found and books balanced at 0.1, a second question that shares.  Servers are forked from
one process that has imported SGLang.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.tiny import glm, internvl, llava, ocr, pixtral, qwen
from models.tiny.checkpoint import LAYERS

ROOT = Path(__file__).parents[2]
ROWS: list[dict[str, Any]] = tomllib.loads((ROOT / "models/matrix.toml").read_text())["model"]
HERE = Path(__file__).relative_to(ROOT).as_posix()
COMMON = (
    *("--load-format", "dummy", "--dtype", "float32", "--chunked-prefill-size", "512", "--max-total-tokens", "16384"),
    *("--max-running-requests", "8", "--enable-cache-report", "--skip-server-warmup", "--sleep-on-idle"),
)
TENTH = ("--kv-policy", "vlcache", "--kv-budget", "0.1")
TOKENS = 24
QUESTIONS = ("What is the code of red K?", "blue A?")
SIZES = ((560, 560), (336, 756))
"""Width and height of the pictures, in pixels."""


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint, and the vision tokens that its family makes of the pictures, worked out by hand."""

    build: Callable[[Path], None]
    tokens: tuple[tuple[int, ...], tuple[int, ...]]
    """Of each picture of `SIZES`: tokens of each run."""
    grids: tuple[tuple[int, int], tuple[int, int]] | None = None
    """Rows and columns of each picture's single grid, where the layout is known."""
    flags: tuple[str, ...] = ()


MODELS: dict[str, Tiny] = {}

DEFAULT_RUN = ("glm4v", "internvl_hf", "qwen3_vl_moe")
"""Three that `make test` serves as well: M-RoPE, tiles, experts."""
