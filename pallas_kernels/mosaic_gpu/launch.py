"""Calling a kernel, and the shared memory that kernels are made of."""

import typing

import jax

from pallas_kernels.mosaic_gpu import steps
from pallas_kernels.mosaic_gpu.plan import WARPGROUP_ROWS, WARPGROUPS, StepPlan
from pallas_kernels.mosaic_gpu.untyped import plgpu
from pallas_kernels.sharding import varying_like


def launch(tile: typing.Callable, inputs: typing.Any, results: tuple, scratch: dict, /, **grid: int) -> tuple:
    """Runs `tile(inputs, results, scratch)`, made with references of all of them, at every point of the grid."""
    leaves, structure = jax.tree.flatten(inputs)

    def run(*refs, **scratch):
        inputs, results = jax.tree.unflatten(structure, refs[: len(leaves)]), refs[len(leaves) :]
        steps.run(lambda: tile(inputs, results, scratch))

    kernel = plgpu.kernel(
        run,
        out_type=results,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return tuple(varying_like(array, inputs.query) for array in kernel(*leaves))


def row_buffer(plan: StepPlan, features: int):
    """For the rows of both warpgroups."""
    return plgpu.SMEM((WARPGROUPS, WARPGROUP_ROWS, features), plan.dtype, transforms=plan.transforms(features))


def step_buffer(plan: StepPlan, features: int, *, summed: bool):
    """A ring for the tokens of steps.

    Args:
      summed: whether a product sums over the tokens.
    """
    shape = (plan.stages, plan.step, features)
    transforms = plan.transforms(features, plan.step if summed else None)
    return plgpu.SMEM(shape, plan.dtype, transforms=transforms)


def barriers(number: int, arrivals: int):
    return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)
