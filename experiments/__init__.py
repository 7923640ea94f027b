"""Experiments that train models or evaluate their quality; each is a program, `python -m experiments.NAME`."""
