"""The GPU harness: attention kernels timed beside their peers on one GPU; `python -m benchmarks.attention` runs it."""
