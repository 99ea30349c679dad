"""Run the parts of a bundle, one process each: `./run.sh` in the bundle.

A part ends within eight minutes.  Its output goes to ``results/PART.log`` as it comes, how it ended to
``results/PART.json``; a part that has succeeded is not run again, so that a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 470.0
TAIL = 2000
SHAPE = "test_cells_arrive and triton"
"""Kernel tests that run under the sanitizer, which is slow: one kernel that reads and writes through lists."""


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    about: str
    command: tuple[str, ...]
    dry: tuple[str, ...] | None
    """The command on a machine without a GPU; None: there is nothing that a CPU could show."""
    needs: str = ""
    """A program that must be there."""


def pytest(*options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options)


def module(name: str, *options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *options)


def parts(results: Path) -> tuple[Part, ...]:
    """All of them, in the order in which they are run: what is wrong comes first, what is slow last."""
    check = ("--out", str(results / "gpu-check.json"), "--minutes", "7.5")
    provider = ("tests/attention/test_providers.py", "tests/attention/test_window.py")
    kernels_only = ("-k", "not (test_window and torch_native)")
    few = ("-k", "test_extend and triton and layer-cells and not lse")
    return (
        Part(
            "kernels",
            "every kernel test, compiled",
            module("benchmarks.gpu.check", "--skip-benchmarks", "--out", str(results / "kernels-check.json")),
            pytest("tests/kernels/test_copy_cells.py"),
        ),
        Part(
            "providers",
            "attention against float64, recorded graphs, waits",
            pytest(*provider, *kernels_only),
            pytest(*provider, *few),
        ),
        Part(
            "streams",
            "free lists, eviction, host memory and staging, where waiting is an error",
            module("benchmarks.bundle.streams"),
            module("benchmarks.bundle.streams", "--dry-run"),
        ),
        Part(
            "sanitizer",
            "one kernel under compute-sanitizer",
            ("compute-sanitizer", "--error-exitcode", "9", *pytest("tests/kernels/test_copy_cells.py", "-k", SHAPE)),
            None,
            needs="compute-sanitizer",
        ),
        Part(
            "benchmarks",
            "kernels against copy bandwidth, FlashInfer and FlashAttention 3 where they are",
            module("benchmarks.gpu.check", "--skip-tests", *check),
            None,
        ),
        Part(
            "staging",
            "prefixes of 2k to 128k tokens from pinned memory",
            module("benchmarks.bundle.staging", "--out", str(results / "staging-times.json")),
            module("benchmarks.bundle.staging", "--dry-run", "--out", str(results / "staging-times.json")),
        ),
    )


def run(part: Part, command: tuple[str, ...], results: Path, seconds: float) -> dict[str, object]:
    """One part; what its file says."""
    log = results / f"{part.name}.log"
    began = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = None
    return {
        **asdict(part),
        "exit": "did not end in time" if code is None else code,
        "seconds": round(time.monotonic() - began, 1),
        "tail": log.read_text()[-TAIL:],
    }


def succeeded(file: Path, dry: bool) -> bool:
    """Whether a part has been run before, with success and on the same kind of machine."""
    if not file.exists():
        return False
    before = json.loads(file.read_text())
    return bool(before["exit"] == 0 and before["dry_run"] == dry)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder; default: results")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some of the parts")
    parser.add_argument("--again", action="store_true", help="also what has succeeded before")
    parser.add_argument("--dry-run", action="store_true", help="what a CPU can show: do the programs start?")
    args = parser.parse_args(argv)
    results = args.results.resolve()
    every = parts(results)
    if unknown := set(args.only or ()) - {part.name for part in every}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; parts: {', '.join(part.name for part in every)}")
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_bundle: no CUDA device; --dry-run shows what a CPU can show", file=sys.stderr)
        return 2
    results.mkdir(parents=True, exist_ok=True)
    wrong = []
    for part in every:
        file = results / f"{part.name}.json"
        command = part.dry if args.dry_run else part.command
        if (args.only and part.name not in args.only) or command is None:
            continue
        if succeeded(file, args.dry_run) and not args.again:
            print(f"{part.name}: done before", flush=True)
            continue
        if part.needs and shutil.which(part.needs) is None:
            print(f"{part.name}: left out, there is no {part.needs}", flush=True)
            continue
        print(f"{part.name}: {part.about} ...", flush=True)
        found = run(part, command, results, SECONDS) | {"dry_run": args.dry_run}
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{part.name}: exit {found['exit']} after {found['seconds']} s", flush=True)
        if found["exit"] != 0:
            wrong.append(part.name)
            print(found["tail"], flush=True)
    print(f"FAILED: {', '.join(wrong)}" if wrong else "all parts have succeeded", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
