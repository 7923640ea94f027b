"""The Hopper kernels measured on a GPU: `python -m benchmarks.attention` there."""
