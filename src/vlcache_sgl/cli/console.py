"""Where the commands print their tables."""

from __future__ import annotations

from rich.console import Console


def table_console(width: int) -> Console:
    """The terminal at its own width; `width` columns where the output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=width)
