"""Which implementation is for which platform, known where it is lowered, which need not be where it is traced."""

import functools

from jax._src import config
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array

PLATFORMS = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}
"""The one platform of implementations that have one; all others are for every platform."""


def interpreted() -> bool:
    """Whether kernels traced now run in an interpreter."""
    return config.pallas_tpu_interpret_mode_context_manager.value is not None


def only_on_its_platform(name: str, array: Array) -> Array:
    """The array; what is computed with it raises NotImplementedError where it is lowered for another platform."""
    return _needs_platform.bind(array, name=name)


def _lowered(context, array, *, name: str, platform: str | None = None):
    if platform == PLATFORMS[name]:
        return [array]
    lowered_for = " and ".join(context.module_context.platforms)
    raise NotImplementedError(
        f"{name}: needs the platform {PLATFORMS[name]!r}, and this is lowered for {lowered_for!r}; take "
        f'implementation=None, or ["{name}", "xla"]'
    )


def _batched(arrays, axes, **parameters):
    return _needs_platform.bind(*arrays, **parameters), axes[0]


_needs_platform = Primitive("s2jax_needs_platform")
_needs_platform.def_abstract_eval(lambda array, **parameters: array)
batching.primitive_batchers[_needs_platform] = _batched
mlir.register_lowering(_needs_platform, _lowered)
for _platform in PLATFORMS.values():
    mlir.register_lowering(_needs_platform, functools.partial(_lowered, platform=_platform), platform=_platform)
