"""Parts of `gpu_check.py`: timing, the cases, a decode kernel to measure with, the report.  None imports SGLang."""
