"""The version of the distribution; part of every policy fingerprint."""

__version__ = "0.1.0"
