"""Out-of-tree SGLang platforms: what a machine without an accelerator needs to serve."""
