"""Generated parts of pages, between the markers `<!-- begin NAME -->` and `<!-- end NAME -->`."""

from __future__ import annotations


def with_block(page: str, name: str, block: str) -> str:
    """`page` with the part between the markers of `name` replaced.

    Raises:
        ValueError: the page lacks them.
    """
    begin, end = f"<!-- begin {name} -->\n", f"\n<!-- end {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page lacks the markers of {name}")
    return f"{before}{begin}{block}{end}{after}"
