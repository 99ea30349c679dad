"""What each layer and KV head of a model needs: measured once per model (`vlcache calibrate`), kept in a small file.

A weight is the share of its tokens that a layer or head keeps when KVzip's scores of generic prompts are ranked over
the whole model (arXiv 2505.23416).  `--kv-weights` hands them to the policies, as `Prompt.layer_weights`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the file; another number is another measurement."""
SAMPLED_BYTES = 1 << 16
"""Bytes of each weights file that name a model: files of equal configuration differ in their first block."""


@dataclass(frozen=True)
class ModelWeights:
    """Shares in [0, 1], higher = needs more of its tokens."""

    layers: tuple[float, ...]
    """`[L]`."""
    heads: tuple[tuple[float, ...], ...] = ()
    """`[L][K]`; empty where KV heads were not measured apart."""
    model: str = ""
    """`model_key` of what was measured; empty for weights of unknown origin."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """On what, how, and what came out: for people."""

    def __post_init__(self) -> None:
        numbers = [*self.layers, *(share for layer in self.heads for share in layer)]
        if not self.layers or not any(self.layers) or not all(0 <= share <= 1 for share in numbers):
            raise ValueError("weights must be shares in [0, 1], one per layer, not all 0")
        if self.heads and (len(self.heads) != len(self.layers) or len({len(layer) for layer in self.heads}) != 1):
            raise ValueError(f"heads must list {len(self.layers)} layers with equally many KV heads each")

    @property
    def digest(self) -> str:
        """Short text, equal for equal weights: prompts that were compressed with others never meet."""
        return hashlib.sha256(json.dumps([self.layers, self.heads]).encode()).hexdigest()[:12]

    def check(self, num_layers: int, num_kv_heads: int) -> None:
        """
        Raises:
            ValueError: they are those of a model of another shape.
        """
        if len(self.layers) != num_layers:
            raise ValueError(f"has {len(self.layers)} layers, the model has {num_layers}")
        if self.heads and len(self.heads[0]) != num_kv_heads:
            raise ValueError(f"has {len(self.heads[0])} KV heads, the model has {num_kv_heads}")

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all: another process may read it meanwhile."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        draft.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        draft.replace(path)


def read_weights(path: Path) -> ModelWeights:
    """What `ModelWeights.write` wrote, or a list with a number per layer.

    Raises:
        ValueError: not readable, or not that; the message names the file.
    """
    try:
        content = json.loads(path.read_text())
        if isinstance(content, list):
            content = {"format": FORMAT, "layers": content}
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"is not a file of `vlcache calibrate` (format {FORMAT})")
        layers, heads = content["layers"], content.get("heads", [])
        return ModelWeights(
            _shares(layers),
            tuple(_shares(layer) for layer in heads),
            str(content.get("model", "")),
            content.get("measured", {}),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _shares(listed: object) -> tuple[float, ...]:
    if not isinstance(listed, list) or not all(type(x) in (int, float) and math.isfinite(x) for x in listed):
        raise ValueError("weights must be lists of numbers")
    return tuple(float(x) for x in listed)


def model_key(folder: Path) -> str:
    """Names a model by its content: configuration, and name, size and first block of every weights file.

    Args:
        folder: of the checkpoint.
    """
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.exists():
        digest.update(config.read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.gguf")]):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()[:24]


def cache_file(key: str) -> Path:
    """Where the weights of a model are kept for the next start: in the folder that the environment names by
    ``VLCACHE_CACHE``, else in the user's cache folder."""
    own = os.environ.get("VLCACHE_CACHE")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlcache-sgl"
    return folder / "weights" / f"{key}.json"


def checkpoint_folder(model: str) -> Path | None:
    """Where a model's files lie: the folder itself, or what was downloaded of that name; None when that is unknown."""
    if Path(model).is_dir():
        return Path(model)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):  # never downloaded, or no name of the hub
        return None


def measured_file(model: str) -> Path | None:
    """What was measured of a model before; None where nothing was, or its files are not on this machine.

    Args:
        model: path or name of the checkpoint.
    """
    folder = checkpoint_folder(model)
    if folder is None or not (path := cache_file(model_key(folder))).exists():
        return None
    return path


def find_weights(setting: str, model: str) -> ModelWeights | None:
    """The weights that `--kv-weights` means for a model; None where it means none, or nothing was measured yet.

    Args:
        setting: ``auto``, ``off`` or a file.
        model: path or name of the checkpoint.

    Raises:
        ValueError: the file cannot be read.
    """
    if setting == "off":
        return None
    if setting != "auto":
        return read_weights(Path(setting))
    path = measured_file(model)
    return None if path is None else read_weights(path)
