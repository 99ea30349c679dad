"""A server process and its HTTP interface."""
