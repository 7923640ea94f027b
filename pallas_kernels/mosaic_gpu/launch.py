"""Calling a kernel, and the shared memory that kernels are made of."""

import math
import typing

import jax

from pallas_kernels.mosaic_gpu import steps
from pallas_kernels.mosaic_gpu.plan import WARPGROUP_ROWS, WARPGROUPS, StepPlan
from pallas_kernels.mosaic_gpu.steps import USUAL, Registers
from pallas_kernels.mosaic_gpu.untyped import plgpu
from pallas_kernels.sharding import varying_like


def launch(
    name: str, tile: typing.Callable, inputs: typing.Any, results: tuple, scratch: dict, grid: dict[str, int],
    registers: Registers = USUAL,
) -> tuple:  # fmt: skip
    """Runs `tile(at, inputs, results, scratch)`, made with references of all of them, at every point of the grid.

    Points start in order, the last axis being the fastest. They are numbered along one axis: a GPU has room for 65,535
    along others.
    """
    leaves, structure = jax.tree.flatten(inputs)

    def run(*refs, **scratch):
        inputs, results = jax.tree.unflatten(structure, refs[: len(leaves)]), refs[len(leaves) :]
        steps.run(lambda: tile(_point(grid), inputs, results, scratch), registers)

    run.__name__ = name
    kernel = plgpu.kernel(
        run,
        out_type=results,
        scratch_types=scratch,
        grid=(math.prod(grid.values()),),
        grid_names=("point",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return tuple(varying_like(array, inputs.query) for array in kernel(*leaves))


def _point(grid: dict[str, int]) -> dict[str, typing.Any]:
    """Where a block of threads is, by the names of the axes."""
    rest, found = jax.lax.axis_index("point"), {}
    for name, size in reversed(grid.items()):
        found[name] = jax.lax.rem(rest, size)
        rest = rest // size
    return found


def row_buffer(plan: StepPlan, features: int, *, summed: bool = False):
    """For the rows of both warpgroups.

    Args:
      summed: whether a product sums over the tokens of the steps that these rows are multiplied with: both lie in
        shared memory in the same way.
    """
    return _buffer(plan, (WARPGROUPS, WARPGROUP_ROWS, features), summed)


def step_buffer(plan: StepPlan, features: int, *, summed: bool):
    """A ring for the tokens of steps.

    Args:
      summed: whether a product sums over the tokens.
    """
    return _buffer(plan, (plan.num_stages, plan.step_size, features), summed)


def _buffer(plan: StepPlan, shape: tuple[int, int, int], summed: bool):
    transforms = plan.transforms(shape[2], plan.step_size if summed else None)
    return plgpu.SMEM(shape, plan.dtype, transforms=transforms)


def barriers(number: int, arrivals: int):
    return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)
