"""Where the bundled model lies: package data of an installed wheel, `models/` of a checkout."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PACKAGE_DATA = "bundled/tinyvlm"
"""Folder of the model in the installed package, see `force-include` in pyproject.toml."""
CHECKOUT = "models/tinyvlm/grounded"
"""The same folder in a checkout, from its root; an editable install reads it there."""


def bundled_model() -> Path:
    """Folder of the bundled checkpoint: a Qwen2.5-VL of 2.3 M parameters in Hugging Face's format.

    Where there is none, the folder that a checkout would have it in: for a message.
    """
    package = Path(str(files("vlcache_sgl")))
    installed = package / PACKAGE_DATA
    return installed if installed.is_dir() else package.parents[1] / CHECKOUT
