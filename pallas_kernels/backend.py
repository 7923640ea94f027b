"""Backends of the op, and the choice among them by platform, chip and arguments."""

import functools
import logging
import typing

import jax
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.sm90.backend import HOPPER
from pallas_kernels.mosaic_tpu import TPU
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.reference import REFERENCE
from pallas_kernels.sharding import Sharding
from pallas_kernels.xla import XLA

LOG = logging.getLogger("s2jax")


class Backend(typing.Protocol):
    """One implementation of the op's passes, on one platform or on all.

    A backend that joins `BACKENDS` is chosen where its platform, its chip and the arguments fit. Backends for several
    chip generations of one platform share a name.
    """

    @property
    def name(self) -> str:
        """The name that `implementation=` takes."""
        ...

    @property
    def platform(self) -> str | None:
        """The platform of the kernels as JAX names it; None for every platform."""
        ...

    @property
    def config_type(self) -> type:
        """The type of the tile sizes that `config=` takes."""
        ...

    @property
    def differentiable(self) -> "Backend":
        """The backend that computes tangents and derivatives of gradients."""
        ...

    def unsupported_reason(self, problem: Problem, operands: Operands) -> str | None:
        """The reason why the arguments are not supported, on any chip; None if they are."""
        ...

    def unsupported_device_reason(self, device: typing.Any) -> str | None:
        """The reason why a device of the platform is not supported; None if it is. `device` is None if unknown."""
        ...

    def forward_tables(self, problem: Problem, operands: Operands) -> typing.Any:
        """A pytree of what the forward pass knows of the schedule, for all heads; None for a selection."""
        ...

    def backward_tables(self, problem: Problem, operands: Operands) -> typing.Any:
        """The same for the backward pass."""
        ...

    def table_specs(self, tables: typing.Any, sharding: Sharding) -> typing.Any:
        """The partition specs of either pass's tables, which say which axis is that of heads."""
        ...

    def forward(self, problem: Problem, operands: Operands) -> tuple[Array, Array]:
        """out [b, t, h, e] in the query's dtype and lse [b, h, t] in the accumulation dtype, sinks included."""
        ...

    def backward(
        self, problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """dq, dk and dv in the inputs' dtype.

        Args:
          dout: [b, t, h, e].
          lse: [b, h, t], sinks included.
          delta: [b, h, t], Σ out · dout - dlse.
        """
        ...


class DifferentiableBackend(Backend, typing.Protocol):
    """A backend that is differentiable in turn, in both modes."""

    def backward(
        self,
        problem: Problem,
        operands: Operands,
        dout: Array,
        lse: Array,
        delta: Array,
        *,
        differentiable: bool = False,
    ) -> tuple[Array, Array, Array]:
        """dq, dk and dv, as in `Backend`; a differentiable pass may be slower."""
        ...

    def tangents(
        self, problem: Problem, operands: Operands, lse: Array, query, key, value, *, differentiable: bool = False
    ) -> tuple[Array, Array]:
        """Σ (P ∘ dl) v + Σ P dv, [b, t, h, e], and Σ P ∘ dl, [b, h, t], in the accumulation dtype.

        P are the weights, sinks included, and dl the tangents of the logits.

        Args:
          lse: [b, h, t], sinks included.
          query, key, value: tangents, None for zero.
          differentiable: as for `backward`.
        """
        ...


BACKENDS: tuple[Backend, ...] = (HOPPER, TPU, XLA, REFERENCE)
"""All backends; without a name, the first that fits is taken, down to XLA's."""

NAMES = tuple(dict.fromkeys(backend.name for backend in BACKENDS))
CHOSEN_UNASKED = NAMES[: NAMES.index(XLA.name) + 1]


def choose(problem: Problem, operands: Operands, implementation) -> tuple[Backend, ...]:
    """Backends that support the arguments, in order of preference, up to the first that is for every platform.

    Raises:
      ValueError: `implementation` or the config is not one that there is.
      NotImplementedError: no backend asked for supports the arguments; the message has each one's reason.
    """
    chosen, reasons = [], []
    for backend in _asked_for(problem, implementation):
        reason = backend.unsupported_reason(problem, operands)
        if reason is None:
            chosen.append(backend)
            if backend.platform is None:
                break
            continue
        reasons.append(f"{backend.name}: {reason}")
        if implementation is None:
            _log_once(f"{backend.name} cannot do it: {reason}")
    if not chosen:
        raise NotImplementedError("; ".join(reasons))
    return tuple(chosen)


def _asked_for(problem: Problem, implementation) -> list[Backend]:
    """The backends of the names that are asked for, in order of preference."""
    config = problem.config
    if implementation is None and config is not None:
        implementation = [backend.name for backend in BACKENDS if isinstance(config, backend.config_type)] or XLA.name
    names = CHOSEN_UNASKED if implementation is None else implementation
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"implementation must be a name, several names or None, got {implementation!r}")
    if not names:
        raise ValueError(f"implementation must name at least one of {', '.join(NAMES)}, got {implementation!r}")
    found = []
    for name in names:
        if name not in NAMES:
            raise ValueError(f"implementation must be among {', '.join(NAMES)}, got {name!r}")
        named = [backend for backend in BACKENDS if backend.name == name]
        fitting = [backend for backend in named if config is None or isinstance(config, backend.config_type)]
        if not fitting:
            expected = " or ".join(backend.config_type.__name__ for backend in named)
            raise ValueError(f"config for {name!r} must be {expected}, got {type(config).__name__}")
        found += fitting
    return found


def unsupported_target_reason(backend: Backend, platform: str, device: typing.Any) -> str | None:
    """The reason why a backend cannot run on what is lowered for; None if it can.

    Args:
      platform: as JAX names it.
      device: one of the platform's devices, None if they are unknown.
    """
    if backend.platform is None:
        return None
    if backend.platform != platform:
        return (
            f"needs the platform {backend.platform!r}, and this is lowered for {platform!r}; take "
            f'implementation=None, or ["{backend.name}", "xla"]'
        )
    return backend.unsupported_device_reason(device or jax.sharding.get_abstract_mesh().abstract_device)


@functools.cache
def _log_once(message: str) -> None:
    LOG.info(message)
