"""The Hopper kernels measured on a GPU: `python benchmarks/attention.py` there."""
