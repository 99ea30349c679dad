"""Carry a whole SGLang to a machine that nothing but small files can be sent to, and run `gpu-e2e` there.

Here, with a network: install SGLang for the machine's Python in a folder SITE, then

    python -m benchmarks.bundle.carry pack SITE --out PARTS

writes the folder SITE as compressed parts of at most 60 MiB.  There, when all parts have arrived:

    python -m benchmarks.bundle.carry unpack PARTS --site SITE
    PYTHONPATH=SITE python -m benchmarks.gpu.e2e

`pack` prints how many parts there are; `unpack` names those that are missing or damaged, and does nothing until none
is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PART_BYTES = 60 << 20
ALREADY_THERE = ("torch", "triton", "nvidia", "functorch", "torchgen")
"""Packages that the machine has."""
LIST = "parts.json"


class Parts:
    """A file to write to that is cut into parts; each is complete when the next begins."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._file: IO[bytes] | None = None
        self._room = 0
        self.names: list[str] = []

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            if not self._room:
                self._next()
            assert self._file is not None
            piece = view[: self._room]
            self._file.write(piece)
            self._room -= len(piece)
            view = view[len(piece) :]
        return len(data)

    def _next(self) -> None:
        self.close()
        self.names.append(f"part-{len(self.names):03d}")
        self._file = (self._folder / self.names[-1]).open("wb")
        self._room = self._most

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Whether a file of the folder travels."""
    parts = member.name.split("/")
    skip = "__pycache__" in parts or (len(parts) > 1 and parts[1].split("-")[0] in ALREADY_THERE)
    return None if skip else member


def pack(site: Path, out: Path, most: int = PART_BYTES) -> list[str]:
    """Write `site` as parts; their names."""
    out.mkdir(parents=True, exist_ok=True)
    parts = Parts(out, most)
    with tarfile.open(fileobj=parts, mode="w|xz") as archive:  # type: ignore[call-overload]
        archive.add(site, arcname="site", filter=wanted)
    parts.close()
    listed = {name: digest(out / name) for name in parts.names}
    (out / LIST).write_text(json.dumps(listed, indent=1) + "\n")
    return parts.names


def problems(folder: Path) -> list[str]:
    """Parts that have not arrived as they were sent."""
    listed: dict[str, str] = json.loads((folder / LIST).read_text())
    missing = [f"{name} is missing" for name in listed if not (folder / name).exists()]
    return missing + [
        f"{name} is damaged"
        for name, expected in listed.items()
        if (folder / name).exists() and digest(folder / name) != expected
    ]


class Joined:
    """The parts as one file to read from."""

    def __init__(self, files: Iterator[Path]) -> None:
        self._files = files
        self._file: IO[bytes] | None = None

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if self._file is None:
                if (path := next(self._files, None)) is None:
                    break
                self._file = path.open("rb")
            if not (piece := self._file.read(size - len(data))):
                self._file.close()
                self._file = None
            data += piece
        return data


def unpack(folder: Path, site: Path) -> None:
    """Put the parts together again."""
    names = json.loads((folder / LIST).read_text())
    joined = Joined(folder / name for name in names)
    with tarfile.open(fileobj=joined, mode="r|xz") as archive:  # type: ignore[call-overload]
        archive.extractall(site.parent, filter="data")
    (site.parent / "site").rename(site)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write a folder of packages as parts")
    packing.add_argument("site", type=Path)
    packing.add_argument("--out", type=Path, required=True)
    unpacking = commands.add_parser("unpack", help="put parts together")
    unpacking.add_argument("parts", type=Path)
    unpacking.add_argument("--site", type=Path, required=True, help="folder to make; must not exist")
    args = parser.parse_args(argv)
    if args.command == "pack":
        names = pack(args.site, args.out)
        total = sum((args.out / name).stat().st_size for name in names)
        print(f"{len(names)} parts, {total / 2**20:.0f} MiB, in {args.out}")
        return 0
    wrong = problems(args.parts) + ([f"{args.site} exists"] if args.site.exists() else [])
    if wrong:
        print("carry: " + "; ".join(wrong), file=sys.stderr)
        return 2
    unpack(args.parts, args.site)
    print(f"PYTHONPATH={args.site} python -m benchmarks.gpu.e2e")
    return 0


if __name__ == "__main__":
    sys.exit(main())
