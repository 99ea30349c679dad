"""Programs that measure, by subject; `run.py` starts those of servers by name.  Not part of the distribution."""
