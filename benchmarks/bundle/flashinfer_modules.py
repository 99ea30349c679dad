"""FlashInfer's FA2 prefill modules, compiled without a GPU, and the few lines of Python that launch them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ARCHITECTURE = "9.0a"

SHIM = '''"""In the place of FlashInfer's module of this name: its FA2 prefill kernels in bf16, compiled beforehand."""

import functools
from pathlib import Path
from types import SimpleNamespace

import torch


@functools.cache
def get_batch_prefill_module(backend, q_dtype, kv_dtype, o_dtype, index_dtype, dim, dim_vo, *plain):
    import tvm_ffi

    file = Path(__file__).with_name(f"bf16_{dim}.so")
    known = (backend, q_dtype, kv_dtype, o_dtype, index_dtype, dim_vo, any(plain))
    if known != ("fa2", *[torch.bfloat16] * 3, torch.int32, dim, False) or not file.exists():
        raise ImportError(f"not compiled beforehand: {known}, head dimension {dim}")
    module = tvm_ffi.load_module(str(file))

    def rest(unused, soft_cap, scale, rotary, items):
        return (*unused, None, None, soft_cap, scale, 1.0 / rotary[0], 1.0 / rotary[1], items)

    def paged_run(*a):
        module["paged_run"](*a[:16], *rest(a[16:22], a[22], a[23], a[27:29], a[29]))

    def ragged_run(*a):
        module["ragged_run"](*a[:14], *rest(a[14:20], a[20], a[21], a[22:24], a[24]))

    return SimpleNamespace(plan=module["plan"], paged_run=paged_run, ragged_run=ragged_run)
'''
UTILS = '''"""In the place of FlashInfer's module of this name."""

import torch


def device_support_pdl(device):
    return torch.cuda.get_device_capability(device)[0] >= 9
'''


def cuda_home(nvcc: str) -> str:
    """Folder of the toolkit that this compiler belongs to: it may be a script that starts another."""
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return os.path.realpath(top[1]) if top else str(Path(nvcc).resolve().parents[1])


def build_module(dim: int) -> Path:
    """Compile the module for bf16 and this head dimension, or find it compiled; the shared library.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: it does not compile.
    """
    if (nvcc := shutil.which("nvcc")) is None:
        raise FileNotFoundError("there is no nvcc: FlashInfer's modules cannot be compiled")
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", ARCHITECTURE)
    os.environ.setdefault("CUDA_HOME", cuda_home(nvcc))
    import torch
    from flashinfer.prefill import _gen_batch_prefill_primary_module

    types = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int32)
    spec = _gen_batch_prefill_primary_module("fa2", *types, dim, dim, 0, False, False, False)
    if not spec.jit_library_path.exists():
        with tempfile.TemporaryDirectory() as folder:
            # The driver's library belongs to machines with a GPU: the linker is content with an empty one.
            driver = ["-shared", "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so", "-x", "c", os.devnull]
            subprocess.run(["cc", *driver], check=True)
            os.environ["LIBRARY_PATH"] = f"{folder}:{os.environ.get('LIBRARY_PATH', '')}"
            spec.build(verbose=False)
    return Path(spec.jit_library_path)
