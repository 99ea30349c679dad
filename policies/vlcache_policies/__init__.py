"""Built-in compression policies: one paper, one file."""
