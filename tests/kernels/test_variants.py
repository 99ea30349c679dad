"""A server compiles each kernel once: lengths, batch sizes and places in memory make no variants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import vlcache_kernels

SCRIPT = Path(__file__).with_name("count_variants.py")
STEPS = 200


def test_one_variant_of_every_kernel() -> None:
    """Of one model with one policy: more are for other types, head dimensions and statistics."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(vlcache_kernels.__file__).parents[1])
    done = subprocess.run([sys.executable, SCRIPT, str(STEPS)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    # Every kernel there is, see `test_compiles.py`; `copy_kernel` takes numbers of either kind of list.
    assert len(found) == 12
    assert found == dict.fromkeys(found, 1)
