"""Timings of the library and their tables. Each module is a program: `python -m benchmarks.NAME`."""
