"""Checkpoints of a few kilobytes in the architectures that people serve: configuration, tokenizer and processor.

They have no weight files: `--load-format dummy` makes weights, and `weights.py` makes them such that attention looks
somewhere.  A model answers nonsense, and the same nonsense wherever it is computed alike.
"""
