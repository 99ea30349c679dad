"""Models of random weights that benchmarks and tests serve."""
