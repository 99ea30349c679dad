"""Which positions of a prompt are text, vision and post-vision text, and which query rows there are.  Pure."""

from __future__ import annotations

from vlcache_sgl.api.needs import Rows
from vlcache_sgl.api.tensors import Prompt, Span

FALLBACK_ROWS = 32
"""Query rows when no text follows the last vision token: the window that SnapKV uses (arXiv 2404.14469)."""


def post_vision(prompt: Prompt) -> Span:
    """Text after the last vision token of the whole prompt, absolute positions; empty when nothing follows.

    With several images these are the tokens after the *last* one: text between images is seen by no query row that
    has seen everything.  A prompt without vision has no post-vision text.
    """
    if not prompt.vision:
        return Span(prompt.length, prompt.length)
    return Span(max(end for _, end in prompt.vision), prompt.length)


def select_rows(rows: Rows, prompt: Prompt) -> Span:
    """The query query rows: one range of absolute positions, all within the owned part of the prompt or behind it.

    * ``post_vision``: `post_vision(prompt)`, the latest `count` of it if `count > 0`.  If that is empty (the image
      ends the prompt, or there is none) the last `FALLBACK_ROWS` owned rows.
    * ``last``: the last `count` rows, fewer if fewer are owned.
    * ``all``: every owned row.
    * ``repeat``: the rows of the second reading, behind the prompt.
    * ``none``: an empty range.

    After a prefix hit rows before ``prompt.start`` do not exist and never count.
    """
    if rows.kind == "none":
        return Span(prompt.length, prompt.length)
    if rows.kind == "repeat":
        return Span(prompt.length, prompt.length + prompt.repeated)
    if rows.kind == "all":
        return Span(prompt.start, prompt.length)
    if rows.kind == "last":
        return _latest(prompt, prompt.start, rows.count)
    begin = max(prompt.start, post_vision(prompt).begin)
    if begin >= prompt.length:
        return _latest(prompt, prompt.start, FALLBACK_ROWS)
    return _latest(prompt, begin, rows.count or prompt.length)


def _latest(prompt: Prompt, begin: int, count: int) -> Span:
    return Span(max(begin, prompt.length - count), prompt.length)
