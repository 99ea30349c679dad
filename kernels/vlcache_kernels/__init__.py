"""Kernels of vlcache-sgl: one folder per operation, a plain torch reference beside each Triton kernel."""
