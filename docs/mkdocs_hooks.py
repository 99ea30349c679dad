"""Makes files outside docs/ part of the site: every file of the repository that a page links to.

The repository's pages link to each other by relative paths, which a reader of the files can follow. In the site, docs/
is the root, so a link is written anew where it crosses that border.  MkDocs calls the two functions that begin with
``on_``; ``make docs`` fails on links that lead nowhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FRONT = tuple(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))
"""Pages of the site although no page of docs/ may link to them; README is the first."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
"""The target of a Markdown link to a file, and its anchor."""


def linked(page: Path) -> Iterator[Path]:
    """The files that a page links to, whether they exist or not; of a folder, its README."""
    for match in LINK.finditer(page.read_text()):
        yield target_of(page, match[1])


def target_of(page: Path, link: str) -> Path:
    """The file that a relative link of `page` means."""
    path = (page.parent / link).resolve()
    return path / "README.md" if path.is_dir() else path


def outside() -> Iterator[Path]:
    """Files outside docs/ that are part of the site: the front pages, and what is linked from page to page."""
    pending, seen = [*FRONT, *DOCS.glob("*.md")], set()
    while pending:
        path = pending.pop()
        if path in seen or not path.is_relative_to(ROOT) or not path.is_file():
            continue
        seen.add(path)
        if not path.is_relative_to(DOCS):
            yield path
        if path.suffix == ".md":
            pending += linked(path)


def place(path: Path) -> str:
    """Where a file of the repository lies in the site."""
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def on_files(files: Any, config: Any) -> Any:
    """MkDocs has listed docs/."""
    from mkdocs.structure.files import File

    for path in outside():
        files.append(File.generated(config, place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs is about to render a page."""
    source = Path(page.file.abs_src_path)

    def rewritten(match: re.Match[str]) -> str:
        path = target_of(source, match[1])
        if not path.is_relative_to(ROOT) or not path.is_file():
            return match[0]  # for MkDocs to complain of
        return os.path.relpath(place(path), os.path.dirname(place(source)) or ".") + (match[2] or "")

    return LINK.sub(rewritten, markdown)
