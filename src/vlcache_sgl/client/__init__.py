"""Starting a server process, and its HTTP interface."""
