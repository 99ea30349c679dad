"""`benchmarks/gpu/check.py` without a GPU: it refuses, its dry run goes all the way, its sums are right."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import check

ROOT = Path(__file__).parents[2]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.check", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"})


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the check itself runs")


@no_gpu
def test_without_a_device_it_refuses() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr
    assert "--dry-run" in done.stderr


def test_without_its_libraries_it_says_which(monkeypatch, capsys) -> None:
    monkeypatch.setattr(check, "NEEDS", ("torch", "no_such_library"))
    assert check.main([]) == 2
    assert "has no no_such_library" in capsys.readouterr().err


def test_it_needs_neither_sglang_nor_what_the_project_installs() -> None:
    """A bare machine with CUDA, PyTorch, Triton and pytest is enough for the check and all kernel tests."""
    folders = [ROOT / folder for folder in ("benchmarks/gpu", "tests/kernels", "kernels")]
    files = [ROOT / "benchmarks/common/host.py", *(f for folder in folders for f in folder.rglob("*.py"))]
    for whole_servers in ("answers", "e2e"):
        files.remove(ROOT / f"benchmarks/gpu/{whole_servers}.py")
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    ours = {"benchmarks", "vlcache_kernels", "vlcache_sgl"}
    assert found - set(sys.stdlib_module_names) - ours == {
        "torch",
        "triton",
        "pytest",
        "numpy",
        "flashinfer",
        "sgl_kernel",
    }


@no_gpu
def test_a_dry_run_goes_all_the_way_and_says_what_it_is(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = run("--dry-run", "--processes", "2", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN" in done.stdout.splitlines()[-2]
    result = json.loads(out.read_text())
    assert result["dry_run"] is True
    assert result["targets"] == []
    assert result["wrong"] == []
    assert result["tests"]["passed"] > 10
    assert result["host"]["torch"] == torch.__version__
    assert {m["case"] for m in result["measurements"]} == {"copy", "a", "b", "c", "d"}
    assert all(m["samples"] and m["skipped"] is None for m in result["measurements"])


def test_when_time_is_up_the_rest_is_skipped_and_said(capsys, tmp_path: Path) -> None:
    from benchmarks.gpu.report import Measured
    from benchmarks.gpu.sizes import TINY
    from benchmarks.gpu.timing import Clock

    wrong: list[str] = []
    found = list(check.measure(TINY, torch.device("cpu"), Clock(0.0), wrong))
    assert wrong == []
    skipped = {m.case: m.skipped for m in found if m.case != "copy"}
    assert skipped == dict.fromkeys("abcd", "out of time")
    result = {"decode_providers": ["triton"], "wrong": [], "dry_run": True}
    assert check.finish(result, Measured(found), None, {m.name: m.layers for m in TINY.models}, [], None, tmp_path) == 0
    said = capsys.readouterr().out
    assert "kernel tests: NOT RUN" in said
    assert f"{len(skipped)} measurements were skipped" in said


def test_tests_that_do_not_end_have_failed() -> None:
    tests = check.run_tests(0.2, 1, ["--collect-only"])
    assert not tests.ok
    assert tests.failed == ["shard 0 did not end within 0 s"]


def test_failures_are_read_from_the_report(tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    file.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="t" name="good"/><testcase classname="t" name="off"><skipped/></testcase>'
        '<testcase classname="t" name="bad"><failure/></testcase>'
        '<testcase classname="t" name="worse"><error/></testcase>'
        "</testsuite></testsuites>"
    )
    tests = check.Tests()
    check.read_report(file, tests)
    assert (tests.passed, tests.skipped, tests.failed) == (1, 1, ["t::bad", "t::worse"])
    assert not tests.ok
    assert not check.Tests().ok, "no test at all is not a success"


@pytest.mark.parametrize(("failed", "status"), [([], 0), (["t::bad"], 1)], ids=["passed", "failed"])
def test_the_exit_status_is_that_of_the_tests(tmp_path, capsys, failed: list[str], status: int) -> None:
    from benchmarks.gpu.report import Measured, Target

    result = {"decode_providers": ["triton"], "wrong": [], "dry_run": False}
    missed = [Target("(b)", "at least 8x", "7.00x", False)]
    tests = check.Tests(passed=3, failed=failed)
    assert check.finish(result, Measured([]), None, {}, missed, tests, tmp_path) == status
    shown = capsys.readouterr().out
    assert "MISSED" in shown
    assert f"3 passed, 0 skipped, {len(failed)} failed" in shown
    assert ("FAILED t::bad" in shown) == bool(failed)


def test_a_wrong_benchmark_is_a_failure_and_the_next_one_runs(monkeypatch, capsys) -> None:
    from benchmarks.gpu import cases
    from benchmarks.gpu.sizes import TINY
    from benchmarks.gpu.timing import Clock, Measurement

    def broken(*_):
        yield Measurement("a", "first", {}, [1.0])
        raise RuntimeError("misaligned address")

    def fine(*_):
        yield Measurement("d", "last", {}, [1.0])

    for name, part in (("statistics", broken), ("decode", fine), ("index", fine), ("selection", fine)):
        monkeypatch.setattr(cases, name, part)
    wrong: list[str] = []
    found = list(check.measure(TINY, torch.device("cpu"), Clock(60), wrong))
    assert [m.name for m in found] == ["device to device copy", "first", "the rest", "last", "last", "last"]
    assert wrong == ["benchmark broken: RuntimeError: misaligned address"]


def test_targets_are_judged_by_the_worst_point() -> None:
    """Numbers with known answers: 1 % and 3 % of attention, 10x and 6.25x, 90 % and 70 % of the copy."""
    from benchmarks.gpu.report import Measured, targets
    from benchmarks.gpu.timing import Measurement

    def at(case: str, name: str, ms: float, moved: int | None = None, **parameters: object) -> Measurement:
        return Measurement(case, name, parameters, [ms, ms, ms], moved)

    copy = 1.0  # GB/s
    measurements = []
    for model, stats, tenth, moved in (("x", 0.01, 0.5, 900), ("y", 0.03, 0.8, 700)):
        point = {"model": model, "batch": 16}
        measurements += [
            at("a", "prefill attention", 1.0, model=model, keys=8192),
            at("a", "column sums and density", stats, model=model, keys=8192),
            at("b", "linear layers", 0.5, **point),
            at("b", "decode attention, triton", 5.0, 10**7, budget=1.0, **point),
            at("b", "decode attention, triton", tenth, round(moved * tenth * 1e3), budget=0.1, **point),
            at("c", "append", 0.02, model=model, batch=16, budget=0.1),
        ]
    found = {t.name: t for t in targets(Measured(measurements), copy, {"x": 2, "y": 2})}
    assert found["(a) statistics at 8192 keys"].found == "3.00 %"
    assert found["(a) statistics at 8192 keys"].met is False
    speed = found["(b) budget 0.1 against 1.0, batch 16 and up"]
    assert (speed.found, speed.met) == ("6.25x", False)
    bandwidth = found["(b) bandwidth at budget 0.1, decode attention, triton"]
    assert (bandwidth.found, bandwidth.met) == ("70 %", False)
    share = found["(c) index of a decode step at budget 0.1"]
    assert (share.found, share.met) == ("1.00 %", True)


def test_layer_budgets_are_ragged_and_have_the_mean_asked_for() -> None:
    from benchmarks.gpu.cases import layer_budgets

    for layers in (3, 28, 32):
        for ratio in (0.05, 0.1, 0.2):
            shares = layer_budgets(layers, ratio)
            assert sum(shares) / layers == pytest.approx(ratio)
            assert max(shares) > 1.5 * min(shares)
        assert layer_budgets(layers, 1.0) == [1.0] * layers
