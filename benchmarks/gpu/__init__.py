"""Programs for a CUDA device: `check` of the kernels, which imports no SGLang, and `e2e` of whole servers."""
