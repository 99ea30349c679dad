"""Write a folder that checks and measures everything on a machine with a GPU: `make gpu-bundle`.

The machine needs Python 3.12, PyTorch, Triton and pytest, no SGLang and no network.  The folder has our packages,
kernel tests, tests of attention and of waits, the benchmarks, and what they need of others: the files of SGLang's
Triton attention from the installed SGLang, and with ``--with-flashinfer`` the modules of FlashInfer that we launch,
compiled here for compute capability 9.0, with the library that loads them.  Both are under the Apache License 2.0,
whose text travels with them.

On the machine: ``cd gpu-bundle && ./run.sh``.  Each part ends within eight minutes; what has succeeded is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 60 << 20
"""The largest bundle."""
OURS = (
    "kernels/vlcache_kernels",
    "policies/vlcache_policies",
    "src/vlcache_sgl",
    "benchmarks/__init__.py",
    "benchmarks/bundle",
    "benchmarks/common",
    "benchmarks/gpu",
    "tests/attention/test_providers.py",
    "tests/attention/test_window.py",
    "tests/kernels",
    "tests/support/attention_reference.py",
    "tests/support/provider_bench.py",
    "LICENSE",
)
SGLANG_FILES = (
    "kernels/ops/attention/decode_attention.py",
    "kernels/ops/attention/extend_attention.py",
    "kernels/ops/attention/score_mod.py",
    "srt/environ.py",
)
"""Of the installed SGLang."""
SGLANG_PACKAGES = ("", "kernels", "kernels/ops", "kernels/ops/attention", "srt")
SGLANG_UTILS = '''"""In the place of SGLang's module of this name: what its attention asks of an NVIDIA GPU."""


import torch


def is_cuda():
    return torch.cuda.is_available()


def is_hip():
    return False


def is_gfx95_supported():
    return False


def is_gfx1250_supported():
    return False


def get_device_core_count(device_id=0):
    return torch.cuda.get_device_properties(device_id).multi_processor_count
'''
PYTEST = """[pytest]
pythonpath = . tests/support src kernels policies
addopts = -ra --strict-markers --import-mode=importlib
markers =
    gpu: needs a CUDA device
    slow: longer than the default run allows
    timeout: most seconds
"""
RUN = """#!/bin/sh
# Check and measure everything: every part within eight minutes, results as it goes, what has succeeded is left out.
cd "$(dirname "$0")" || exit 2
PYTHONPATH="$PWD:$PWD/src:$PWD/kernels:$PWD/policies" exec "${PYTHON:-python3}" -m benchmarks.bundle.run "$@"
"""
PYTHON = "3.12"
"""Of the machine."""
HEAD_DIMS = (64, 128)
"""Of FlashInfer's modules: 64 in tests, 128 in benchmarks."""


def copy_ours(target: Path) -> None:
    for name in OURS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)


def package(name: str) -> Path:
    """Folder of an installed package.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{name} is not installed in {sys.prefix}")
    return Path(next(iter(spec.submodule_search_locations)))


def licence_of(name: str) -> str:
    """Text of the licence of an installed distribution, for the bundle."""
    files = [file for file in distribution(name).files or [] if "licen" in file.name.lower()]
    texts = [Path(str(file.locate())).read_text() for file in files]
    return "\n".join(texts) or f"{name}: {distribution(name).metadata['License-Expression'] or 'Apache License 2.0'}\n"


def copy_sglang(target: Path) -> None:
    """SGLang's Triton attention, as a package that has nothing else."""
    source = package("sglang")
    for name in SGLANG_PACKAGES:
        folder = target / "sglang" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text("")
    for name in SGLANG_FILES:
        shutil.copy(source / name, target / "sglang" / name)
    (target / "sglang/srt/utils.py").write_text(SGLANG_UTILS)
    (target / "sglang/LICENSE").write_text(licence_of("sglang"))


def copy_flashinfer(target: Path) -> None:
    """Compile the modules of FlashInfer that we launch, which takes minutes, and add them with what loads them."""
    from benchmarks.bundle.flashinfer_modules import SHIM, UTILS, build_module

    folder = target / "flashinfer"
    folder.mkdir()
    for dim in HEAD_DIMS:
        shutil.copy(build_module(dim), folder / f"bf16_{dim}.so")
    (folder / "__init__.py").write_text("")
    (folder / "prefill.py").write_text(SHIM)
    (folder / "utils.py").write_text(UTILS)
    (folder / "LICENSE").write_text(licence_of("flashinfer-python"))
    # What loads them is compiled for one Python, and that machine's need not be ours.
    wheel = f"apache-tvm-ffi=={version('apache-tvm-ffi')}"
    wanted = ("--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--target", str(target), wheel)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
    for spare in target.glob("tvm_ffi/**/*.a"):
        spare.unlink()


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def build(target: Path, *, flashinfer: bool) -> int:
    """Write the bundle; its size in bytes.

    Raises:
        FileNotFoundError: SGLang or FlashInfer is not installed.
        ValueError: it has become too large.
        subprocess.CalledProcessError: FlashInfer's modules do not compile.
    """
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    copy_ours(target)
    copy_sglang(target)
    if flashinfer:
        copy_flashinfer(target)
    (target / "pytest.ini").write_text(PYTEST)
    (target / "run.sh").write_text(RUN)
    os.chmod(target / "run.sh", 0o755)
    size = size_of(target)
    if size > MOST_BYTES:
        raise ValueError(f"{target} has {size / 2**20:.1f} MiB, at most {MOST_BYTES >> 20} are allowed")
    return size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu-bundle", help="folder; default: out/gpu-bundle")
    parser.add_argument("--with-flashinfer", action="store_true", help="compile FlashInfer's modules; needs nvcc")
    args = parser.parse_args(argv)
    try:
        size = build(args.out, flashinfer=args.with_flashinfer)
    except (FileNotFoundError, ValueError, subprocess.CalledProcessError) as error:
        print(f"gpu_bundle: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {size / 2**20:.1f} MiB; there: ./run.sh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
