"""Check and measure the kernels on a CUDA device: `python -m benchmarks.gpu.check`.

Needs PyTorch, Triton and pytest; not SGLang, and FlashInfer only to measure it too.  First every kernel test runs
compiled, the full matrix on several processes; then the benchmarks, while time is left; a short table comes last and a
JSON file keeps every sample.  The exit status is 0 if all tests ran and passed: a missed target is a finding, not a
failure.

``--dry-run`` goes through the same steps on a CPU, with tiny sizes in Triton's interpreter.  Its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from subprocess import DEVNULL, Popen
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a bare machine may lack is imported after `unfit`
    import torch

    from benchmarks.gpu.report import Measured, Target
    from benchmarks.gpu.sizes import Sizes
    from benchmarks.gpu.timing import Clock, Measurement

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "src")]
NEEDS = ("torch", "triton", "pytest")
MINUTES = 8.0
# What the tests may take of it, so that the benchmarks get their part.
TEST_SHARE = 0.55
# Left at the end for the report.
RESERVE_SECONDS = 15.0


@dataclass
class Tests:
    """The outcome of the kernel tests."""

    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.failed and self.passed > 0


def run_tests(seconds: float, processes: int, select: list[str]) -> Tests:
    """All kernel tests, cut into as many shards as processes; what does not end in time has failed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    options = ["-q", "--maxfail=20", "-p", "no:cacheprovider", f"--confcutdir={ROOT / 'tests/kernels'}"]
    # What is compiled offline elsewhere is compiled by the others here.
    options.append(f"--ignore={ROOT / 'tests/kernels/test_compiles.py'}")
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests/kernels"), *options, *select]
    tests = Tests()
    began = monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.xml" for i in range(processes)]
        logs = [file.with_suffix(".log").open("w+") for file in files]
        shards = [
            Popen(
                [*command, f"--junitxml={file}", f"--shard={i}/{processes}"],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=DEVNULL,
            )
            for i, (file, log) in enumerate(zip(files, logs, strict=True))
        ]
        while any(shard.poll() is None for shard in shards) and monotonic() - began < seconds:
            sleep(0.2)
        for i, (shard, file, log) in enumerate(zip(shards, files, logs, strict=True)):
            if shard.poll() is None:
                shard.kill()
                shard.wait()
                tests.failed.append(f"shard {i} did not end within {seconds:.0f} s")
            elif shard.returncode not in (0, 1, 5) or not file.exists():  # 1: failures, 5: an empty shard
                log.seek(0)
                tests.failed.append(f"shard {i} ended with {shard.returncode}: {log.read()[-2000:]}")
            else:
                read_report(file, tests)
            log.close()
    tests.seconds = monotonic() - began
    return tests


def read_report(file: Path, tests: Tests) -> None:
    """Add one junit file."""
    for case in ET.parse(file).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            tests.failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            tests.skipped += 1
        else:
            tests.passed += 1


def check_decode(device: torch.device) -> list[str]:
    """The decode attention that (b) measures, against float64; names of providers that are wrong."""
    import torch

    from benchmarks.gpu.decode import providers, reference_decode

    rng = torch.Generator().manual_seed(0)
    arena = torch.randn(400, 2, 4, 64, generator=rng).to(torch.bfloat16).to(device)
    indptr = torch.tensor([0, 1, 131, 300], dtype=torch.int32, device=device)
    indices = torch.randperm(400, generator=rng)[:300].to(torch.int32).to(device)
    wrong = []
    for name, provider in providers().items():
        for heads in (4, 28):
            queries = torch.randn(3, heads, 64, generator=rng).to(torch.bfloat16).to(device)
            expected = reference_decode(queries, arena, indptr, indices)
            try:
                found = provider(queries, arena, indptr, indices, 200)()
            except Exception as error:
                if name == "triton":
                    raise
                print(f"{name} does not run here: {type(error).__name__}: {str(error)[:200]}")
                break
            # bf16 output and bf16 weights in the second product.
            if not bool(((found.double() - expected).norm() / expected.norm()) < 1e-2):
                wrong.append(f"decode attention, {name}, {heads} heads")
    return wrong


def measure(sizes: Sizes, device: torch.device, clock: Clock, wrong: list[str]) -> Iterator[Measurement]:
    """All measurements; a benchmark that breaks is added to `wrong`, and the next one begins."""
    from benchmarks.gpu import cases
    from benchmarks.gpu.timing import Measurement, copy_bandwidth

    yield copy_bandwidth(device, sizes.copy_bytes)
    for part in (cases.statistics, cases.decode, cases.index, cases.selection):
        try:
            for measurement in part(sizes, device, clock):
                label = " ".join(f"{key}={value}" for key, value in measurement.parameters.items())
                took = measurement.skipped if measurement.ms is None else f"{measurement.ms:.4f} ms"
                print(f"({measurement.case}) {measurement.name}  {label}  {took}", flush=True)
                yield measurement
        except Exception as error:
            traceback.print_exc()
            what = f"{type(error).__name__}: {str(error)[:200]}"
            wrong.append(f"benchmark {part.__name__}: {what}")
            yield Measurement(part.__name__, "the rest", {}, skipped=what)


def host() -> dict[str, Any]:
    """Device, versions, commit; a bare machine may have neither Git nor a checkout."""
    import torch
    import triton

    from benchmarks.common.host import host_block

    try:
        block: dict[str, Any] = {**host_block()}
    except OSError as error:
        block = {"incomplete": str(error)}
    block["cuda"] = torch.version.cuda
    block["torch"], block["triton"] = torch.__version__, triton.__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        block["device_name"] = properties.name
        block["multiprocessors"] = properties.multi_processor_count
        block["compute_capability"] = f"{properties.major}.{properties.minor}"
    return block


def unfit(dry_run: bool) -> str | None:
    """Why this machine cannot run the check, in a line; None if it can."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {' and no '.join(missing)}; choose another with make gpu-check GPU_PYTHON=..."
    import torch

    if dry_run and torch.cuda.is_available():
        return "--dry-run is for machines without a CUDA device; leave it out here"
    if not dry_run and not torch.cuda.is_available():
        return (
            "no CUDA device: torch.cuda.is_available() is false; nothing was checked "
            "(without one: python -m pytest tests/kernels, or --dry-run to see that this program works)"
        )
    return None


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file (default: results/gpu-check-<device>.json)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="end within this time (default: 8)")
    parser.add_argument("--processes", type=int, default=min(8, max(1, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--models", nargs="+", metavar="NAME", help="benchmarks with the shapes of these models only")
    parser.add_argument("--skip-tests", action="store_true", help="benchmarks only; the result says so")
    parser.add_argument("--skip-benchmarks", action="store_true", help="tests only")
    parser.add_argument("--dry-run", action="store_true", help="the same steps on a CPU; its times mean nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.dry_run:  # before Triton is imported: it decides then whether it compiles
        os.environ["TRITON_INTERPRET"] = "1"
    if problem := unfit(args.dry_run):
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 2
    import torch

    from benchmarks.common.host import command_line, device_name
    from benchmarks.gpu import decode, report
    from benchmarks.gpu.sizes import TINY, Sizes
    from benchmarks.gpu.timing import Clock

    clock = Clock(args.minutes * 60 - RESERVE_SECONDS)
    device = torch.device("cpu" if args.dry_run else "cuda")
    sizes = TINY if args.dry_run else Sizes()
    if args.models:
        sizes = replace(sizes, models=tuple(model for model in sizes.models if model.name in args.models))
    tests = None
    if not args.skip_tests:
        # The dry run takes one fast file: that the tests pass here is what `make test` sees to.
        select = ["-k", "test_arena_write and not slow"] if args.dry_run else []
        tests = run_tests(clock.left() * TEST_SHARE, args.processes, select)
        print(f"tests: {tests.passed} passed, {tests.skipped} skipped, {len(tests.failed)} failed", flush=True)
    wrong = check_decode(device)
    measurements = [] if args.skip_benchmarks else list(measure(sizes, device, clock, wrong))

    measured = report.Measured(measurements)
    copy = next((m.gb_per_s for m in measurements if m.case == "copy"), None)
    layers = {model.name: model.layers for model in sizes.models}
    aims = [] if args.dry_run else report.targets(measured, copy, layers)
    result = {
        "task": "gpu-check",
        "dry_run": args.dry_run,
        "command": command_line(),
        "host": host(),
        "decode_providers": list(decode.providers()),
        "tests": None if tests is None else asdict(tests),
        "wrong": wrong,
        "targets": [asdict(aim) for aim in aims],
        "measurements": [asdict(m) | {"ms": m.ms, "gb_per_s": m.gb_per_s} for m in measurements],
    }
    folder = ROOT / ("out" if args.dry_run else "benchmarks/results")
    out = args.out or folder / f"gpu-check-{device_name()}{'-dry-run' if args.dry_run else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return finish(result, measured, copy, layers, aims, tests, out)


def finish(
    result: dict[str, Any],
    measured: Measured,
    copy: float | None,
    layers: dict[str, int],
    aims: list[Target],
    tests: Tests | None,
    out: Path,
) -> int:
    """Print the table, last what matters most; the exit status."""
    from benchmarks.gpu import report

    rows = [
        *report.rows_a(measured),
        *report.rows_b(measured, copy),
        *report.rows_c(measured, layers),
        *report.rows_d(measured),
    ]
    print("\n" + report.table(rows))
    if copy is not None:
        print(f"\nmeasured copy: {copy:.0f} GB/s, read and written")
    words = {True: "met", False: "MISSED", None: "not measured"}
    if aims:
        print(report.table([[aim.name, aim.aim, aim.found, words[aim.met]] for aim in aims]))
    if "flashinfer" not in result["decode_providers"] and not result["dry_run"]:
        print("FlashInfer cannot be imported here: decode attention was measured with the Triton kernel of this check")
    failed = [*(tests.failed if tests else []), *result["wrong"]]
    for name in failed[:20]:
        print(f"FAILED {name}")
    if tests is None:
        print("kernel tests: NOT RUN")
    else:
        print(f"kernel tests: {tests.passed} passed, {tests.skipped} skipped, {len(failed)} failed")
    skipped = sum(m.skipped is not None for m in measured.all)
    if skipped:
        print(f"{skipped} measurements were skipped, see the file")
    if result["dry_run"]:
        print("DRY RUN in Triton's interpreter on a CPU: the times above are not results")
    print(f"written: {out}")
    return 1 if failed or (tests is not None and not tests.ok) else 0


if __name__ == "__main__":
    sys.exit(main())
