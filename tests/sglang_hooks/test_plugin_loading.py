"""Policy plugins are other people's code: imported where a policy is asked for, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vlcache_sgl.config import ConfigError
from vlcache_sgl.policy import policy, registry
from vlcache_sgl.sglang_hooks import flags

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests/e2e/plugins/broken_policies"

PROGRAM = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from vlcache_sgl.sglang_hooks import startup
arguments = prepare_server_args(["--model-path", sys.argv[1], "--device", "cpu", *sys.argv[2:]])
if len(sys.argv) == 2:
    # What is patched without a policy: the constructors of both processes.
    startup.start_scheduler(lambda *_: None, object(), arguments)
    startup.start_tokenizer(lambda *_: None, object(), arguments)
print("loaded:", sorted(name for name in ("vlcache_policies", "broken_policies") if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("flags", "loaded"),
    [((), "[]"), (("--kv-policy", "vlcache"), "['broken_policies', 'vlcache_policies']")],
    ids=["without a policy", "with a policy"],
)
def test_policy_plugins_are_imported_when_a_policy_is_asked_for(flags: tuple[str, ...], loaded: str) -> None:
    inherited = os.environ.get("PYTHONPATH")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PLUGIN), *([inherited] if inherited else [])])}
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "models/tinyvlm/grounded"), *flags]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.splitlines()[-1] == f"loaded: {loaded}"


def test_a_broken_plugin_is_not_blamed_on_flags_that_were_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(registry(), problems=("acme 2 (entry point a = b): cannot be imported: no",))
    for module in (policy, flags):
        monkeypatch.setattr(module, "registry", lambda: broken)
    with pytest.raises(ConfigError) as caught:
        flags.check_flags({"kv_policy": "vlcache"})
    assert str(caught.value) == f"--kv-policy: broken policy plugins (fix or uninstall them): {broken.problems[0]}"
