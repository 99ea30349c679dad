"""Small videos, for servers that read them."""

from __future__ import annotations

import base64
import importlib
import io
from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image


def need_ffmpeg(film: bytes) -> None:
    """Skip where SGLang could not read `film`."""
    try:
        importlib.import_module("torchcodec.decoders").VideoDecoder(film)
    except (ImportError, RuntimeError):
        pytest.skip("SGLang reads videos with torchcodec, which finds no FFmpeg libraries")


def film_of(frames: Sequence[Image.Image]) -> bytes:
    """Four images a second, which SGLang thins to two."""
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=250)
    return file.getvalue()


def message(film: bytes, question: str) -> dict[str, Any]:
    """A user's turn about a video."""
    url = "data:video/mp4;base64," + base64.b64encode(film).decode()
    parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": question}]
    return {"role": "user", "content": parts}
