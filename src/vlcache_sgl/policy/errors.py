"""What goes wrong before a policy runs."""

from __future__ import annotations


class PolicyError(ValueError):
    """A policy cannot be loaded, found or built; the message is for the user and lists the choices."""
