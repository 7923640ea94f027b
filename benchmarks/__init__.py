"""Timings of the library, and the tables made of them; each module is a program, `python -m benchmarks.NAME`."""
