"""What a result must say about where it came from."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vlcache-sgl", "sglang", "torch", "transformers", "triton", "flashinfer-python", "numpy")


class Host(TypedDict):
    """Where, when and with what something was measured."""

    device: str
    """The accelerator or the number of CPU cores, as in the name of the file."""
    processor: str
    cores: int
    memory_gb: float
    system: str
    python: str
    packages: dict[str, str | None]
    """Versions of `PACKAGES`; None: not installed."""
    commit: str | None
    uncommitted_changes: bool
    date: str
    """ISO 8601, UTC."""
    load_average_at_start: float


def device_name() -> str:
    """The accelerator, or the number of CPU cores, as part of a file name."""
    import torch

    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"cpu-{os.cpu_count()}-cores"


def host_block() -> Host:
    """Machine, versions, commit, time and load."""
    return {
        "device": device_name(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def command_line() -> str:
    """The command as typed, with `python` for the interpreter and paths relative to the repository."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None:  # python -m
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(name), *sys.argv[1:]])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if re.match(r"(model name|flags)\s*:", line))
    wide = " with AVX-512" if "avx512f" in fields.get("flags", "") else ""
    return fields.get("model name", platform.processor()) + wide


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return ran.stdout.strip() if ran.returncode == 0 else None
