"""Experiments that train models or evaluate their quality. Each is a program: `python -m experiments.NAME`."""
