"""What keeps the number of compiled variants of a kernel small.

Triton compiles a kernel anew for integers that are 1, or divisible by 16, and for pointers that are aligned.  In a
server lengths and batch sizes differ from step to step, and so would the variants.  Our kernels are told not to look at
either; where a row is to be read in vectors, a constant of the model says what divides its stride.  Block sizes are
constants of the model, too.
"""

from __future__ import annotations


def alignment(elements: int) -> int:
    """The largest power of two up to 16 that divides `elements`."""
    return min(16, elements & -elements)
