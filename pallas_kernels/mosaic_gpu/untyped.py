"""Pallas for Mosaic GPU without its types, which take the references of a kernel for arrays."""

import typing

import jax.experimental.pallas.mosaic_gpu as mosaic_gpu

plgpu: typing.Any = mosaic_gpu
