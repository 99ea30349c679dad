"""The bundle for a GPU's first minutes: small enough, complete, and its programs start on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.bundle import build

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the parts themselves run")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sglang")
    target = tmp_path_factory.mktemp("bundle") / "gpu-bundle"
    assert build.build(target, flashinfer=False) == build.size_of(target) <= build.MOST_BYTES
    return target


def run(bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        [str(bundle / "run.sh"), *options],
        capture_output=True,
        text=True,
        env=environment | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )


def test_it_has_what_it_needs_and_whose_it_is(bundle: Path) -> None:
    for name in ("run.sh", "LICENSE", "sglang/LICENSE", "sglang/kernels/ops/attention/extend_attention.py"):
        assert (bundle / name).stat().st_size > 0
    assert not list(bundle.rglob("__pycache__"))
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sglang, sys; from sglang.kernels.ops.attention import extend_attention as e; print(e.__file__)",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(bundle)},
        cwd=bundle,
    )
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).is_relative_to(bundle), "an installed SGLang was found, not the bundle's files"


@no_gpu
def test_without_a_device_it_refuses(bundle: Path) -> None:
    done = run(bundle)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@no_gpu
def test_its_programs_start_and_a_second_run_goes_on(bundle: Path, tmp_path: Path) -> None:
    """All parts that a CPU can show, in the interpreter where they are kernels; what has succeeded is left out."""
    first = run(bundle, "--dry-run", "--results", str(tmp_path))
    assert first.returncode == 0, first.stdout + first.stderr
    for part in ("kernels", "providers", "streams", "staging"):
        found = json.loads((tmp_path / f"{part}.json").read_text())
        assert (found["exit"], found["dry_run"]) == (0, True)
        assert (tmp_path / f"{part}.log").stat().st_size > 0
    assert "passed" in (tmp_path / "providers.log").read_text()
    assert json.loads((tmp_path / "staging-times.json").read_text())["sizes"]
    again = run(bundle, "--dry-run", "--results", str(tmp_path))
    assert again.returncode == 0
    assert again.stdout.count("done before") == 4


@no_gpu
def test_a_part_that_fails_is_named_and_run_again(bundle: Path, tmp_path: Path) -> None:
    program = bundle / "benchmarks/bundle/streams.py"
    text = program.read_text()
    program.write_text("raise SystemExit('broken')\n")
    try:
        done = run(bundle, "--dry-run", "--only", "streams", "--results", str(tmp_path))
    finally:
        program.write_text(text)
    assert done.returncode == 1
    assert "FAILED: streams" in done.stdout
    assert "broken" in done.stdout
    again = run(bundle, "--dry-run", "--only", "streams", "--results", str(tmp_path))
    assert again.returncode == 0, again.stdout


def test_a_bundle_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "MOST_BYTES", 1000)
    assert build.main(["--out", str(tmp_path / "bundle")]) == 2
