"""Generated parts of pages, between the markers `<!-- begin NAME -->` and `<!-- end NAME -->`."""

from __future__ import annotations

from collections.abc import Mapping


def with_block(page: str, name: str, block: str) -> str:
    """`page` with the part between the markers of `name` replaced.

    Raises:
        ValueError: the page lacks them, or has them twice.
    """
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed) or begin in after:
        raise ValueError(f"the page needs one pair of markers for {name}: {begin.strip()} and {end}")
    return f"{before}{begin}{block}\n{end}{after}"


def with_blocks(page: str, blocks: Mapping[str, str]) -> str:
    """`page` with the parts of all `blocks` replaced, by the names of their markers.

    Raises:
        ValueError: the page lacks one of them, or has it twice.
    """
    for name, block in blocks.items():
        page = with_block(page, name, block)
    return page
