"""Ground truth that tests and benchmarks share: brute force, with nothing of the library."""
