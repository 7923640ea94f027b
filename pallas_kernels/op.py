"""The public op: checks, the choice of a backend, and one `custom_vjp` for all of them."""

import dataclasses
import functools
import logging
import types
import typing

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from pallas_kernels import mosaic_gpu, mosaic_tpu, reference, xla
from pallas_kernels.checks import check_number, check_operands
from pallas_kernels.head_place import HeadAxis, HeadRange, own_rows
from pallas_kernels.platforms import PLATFORMS, interpreted, only_on_its_platform
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.sharding import Sharding, equally_varying, over_shards, sharded_like
from pallas_kernels.sinks import sink_gradients

LOG = logging.getLogger("s2jax")

OUT_NAME, LSE_NAME = "s2jax_out", "s2jax_lse"
"""`checkpoint_name`s of the two residuals that are worth keeping when a layer is rematerialised."""

with_own_gradient: typing.Any = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))

FORWARD: dict[str, types.ModuleType] = {
    "xla": xla,
    "mosaic_gpu": mosaic_gpu,
    "mosaic_tpu": mosaic_tpu,
    "reference": reference,
}
BACKWARD = FORWARD
DIFFERENTIABLE: dict[str, types.ModuleType] = FORWARD | {"mosaic_gpu": xla, "mosaic_tpu": xla}
"""Which module computes the passes of each implementation, and the backward pass that is differentiated again."""

PREFERRED = ("mosaic_gpu", "mosaic_tpu", "xla")
"""What is taken where no implementation is asked for: the first that can do it on the platform."""


def block_sparse_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k e"],
    schedule: BlockSchedule | BlockSelection,
    *,
    scale: float | None = None,
    query_offset: int | Int32[Array, "#b"] | None = None,
    query_segment_ids: Int32[Array, "b t"] | None = None,
    kv_segment_ids: Int32[Array, "b s"] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " h"] | None = None,
    return_lse: bool = False,
    query_spec: PartitionSpec | None = None,
    head_axis: HeadAxis = None,
    heads: HeadRange = None,
    implementation: str | list[str] | tuple[str, ...] | None = None,
    tiles=None,
) -> typing.Any:
    """Attention in which every query reads the blocks of keys that a schedule lists for its head.

    Query head i reads KV head i // (h / k). Softmax and sums are in float32, or float64 for float64 inputs.

    Args:
      query, key, value: one dtype, bfloat16, float16, float32 or float64.
      schedule: a compiled pattern, or blocks chosen at run time.
      scale: what the logits are multiplied with; d**-0.5 by default.
      query_offset: position of the first query among the keys, known at run time only: a scalar or [b]. The schedule is
        then compiled from position 0 on, for all positions that may come; the result of others is NaN.
      query_segment_ids, kv_segment_ids: queries see keys with an equal id only. Both or neither.
      logits_soft_cap: logits become cap · tanh(logits / cap); in "mosaic_gpu" by the GPU's approximate tanh.
      sinks: one more logit per query head in the softmax's sum, neither scaled nor capped.
      return_lse: gives back (out, lse).
      query_spec: how the query is sharded over a mesh with Auto axes, as P(batch, None, heads, None). The mesh must be
        set, with `jax.set_mesh`: of a mesh that is not, nothing can be known here, and XLA gathers what is sharded.
      head_axis: axis of a caller's `shard_map`, `pmap` or named `vmap` over which heads are split, or several; the
        schedule is compiled for all heads. () says that this call has all heads. Needed inside of such a region where
        the schedule's heads differ; a `BlockSelection` has its own heads.
      heads: (first_head, num_heads) in its place, where the heads are split otherwise: the number of this call's first
        query head, also known at run time only (the result for one that cannot be is NaN), and the count of all.
      implementation: "mosaic_gpu", "mosaic_tpu", "xla" or "reference", or several names in order of preference; None
        picks by the platform that is lowered for. To export for several platforms at once, take "xla": JAX lowers
        kernels for one.
      tiles: tile sizes of the one implementation asked for, `HopperTiles`, `TpuTiles` or `XlaTiles`.

    Returns:
      out [b, t, h, e] in the query's dtype; lse [b, h, t] in float32 (float64 for float64), the natural logarithm of
      the sum of exp(logit) over what the row reads, sink included. A row that reads nothing gives zeros and the sink or
      -inf.

    Raises:
      ValueError: an argument does not fit; the message says what was expected and what came.
      NotImplementedError: none of the implementations asked for can do it, with each one's reason.
    """
    operands, fits = check_operands(
        schedule, query, key, value, query_offset, query_segment_ids, kv_segment_ids, sinks, head_axis, heads
    )
    problem = Problem(
        schedule=None if isinstance(schedule, BlockSelection) else schedule,
        scale=query.shape[-1] ** -0.5 if scale is None else check_number("scale", scale),
        logits_soft_cap=None if logits_soft_cap is None else check_number("logits_soft_cap", logits_soft_cap, above=0),
        tiles=tiles,
        # One object, for whether two arrays are equal is not known while tracing.
        same_segments=query_segment_ids is not None and query_segment_ids is kv_segment_ids,
    )
    operands = equally_varying(operands)
    call = Call(*_choose(problem, operands, implementation), problem, query_spec)
    rest = dataclasses.replace(operands, query=None, key=None, value=None, sinks=None)
    out, lse = _compiled(call, operands.query, operands.key, operands.value, operands.sinks, rest)
    if fits is not None:
        out, lse = (jnp.where(fits, each, jnp.nan) for each in (out, lse))
    return (out, lse) if return_lse else out


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a call.

    Attributes:
      implementation: a name.
      on: platforms that take another, and its name.
    """

    implementation: str
    on: tuple[tuple[str, str], ...]
    problem: Problem
    query_spec: PartitionSpec | None


def _choose(problem: Problem, operands: Operands, implementation) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The implementation, and those of platforms that take another, which comes before it in order of preference."""
    on, reasons = [], []
    for name in _names(problem, implementation):
        reason = FORWARD[name].refuse(problem, operands)
        if reason is not None:
            reasons.append(f"{name}: {reason}")
            if implementation is None:
                _log_once(f"{name} cannot do it: {reason}")
        elif name in PLATFORMS:
            on.append((PLATFORMS[name], name))
        else:
            return name, tuple(on)
    if not on:
        raise NotImplementedError("; ".join(reasons))
    return on[-1][1], tuple(on[:-1])


def _names(problem: Problem, implementation) -> tuple[str, ...]:
    """In order of preference."""
    if implementation is None and problem.tiles is None:
        return PREFERRED
    if implementation is None:
        implementation = [name for name in FORWARD if isinstance(problem.tiles, FORWARD[name].TILES)] or "xla"
    names = (implementation,) if isinstance(implementation, str) else implementation
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"implementation must be a name, several names or None, got {implementation!r}")
    if not names:
        raise ValueError(f"implementation must name at least one of {', '.join(FORWARD)}, got {implementation!r}")
    for name in names:
        if name not in FORWARD:
            raise ValueError(f"implementation must be among {', '.join(FORWARD)}, got {name!r}")
        if problem.tiles is not None and not isinstance(problem.tiles, FORWARD[name].TILES):
            raise ValueError(
                f"tiles for {name!r} must be {FORWARD[name].TILES.__name__}, got {type(problem.tiles).__name__}"
            )
    return tuple(names)


@functools.cache
def _log_once(message: str) -> None:
    LOG.info(message)


class Pass:
    """The forward or the backward pass of a call, by whichever modules compute it."""

    def __init__(self, modules: dict[str, types.ModuleType], name: str, call: Call, operands: Operands):
        self.name, self.call = name, call
        self.modules = {each: modules[each] for each in (call.implementation, *(other for _, other in call.on))}
        self.tables = {
            module.__name__: getattr(module, f"{name}_tables")(self._problem(module), operands)
            for module in self.modules.values()
        }

    def with_tables(self, operands: Operands) -> Operands:
        """The operands with the tables of their heads."""
        tables, schedule = self.tables, self.call.problem.schedule
        if operands.first_head is not None and schedule is not None:
            num_heads, total = operands.query.shape[2], schedule.num_heads
            tables = own_rows(tables, self.table_specs, operands.first_head, num_heads, total)
        return dataclasses.replace(operands, tables=tables, first_head=None)

    def _problem(self, module: types.ModuleType) -> Problem:
        """Without the tiles of another module."""
        tiles = self.call.problem.tiles
        return dataclasses.replace(self.call.problem, tiles=tiles if isinstance(tiles, module.TILES) else None)

    def __call__(self, operands: Operands, *arrays, **options):
        """Computes it, `operands.tables` being those of all modules."""

        def by(module: types.ModuleType):
            def function(operands: Operands, *arrays):
                mine = dataclasses.replace(operands, tables=operands.tables[module.__name__])
                return getattr(module, self.name)(self._problem(module), mine, *arrays, **options)

            return function

        default = self.modules[self.call.implementation]
        others = {platform: self.modules[name] for platform, name in self.call.on if self.modules[name] is not default}
        branches = {platform: by(module) for platform, module in others.items()}
        if default is FORWARD[self.call.implementation] and self.call.implementation in PLATFORMS and not interpreted():
            query = only_on_its_platform(self.call.implementation, operands.query)
            operands = dataclasses.replace(operands, query=query)
        if not branches:
            return by(default)(operands, *arrays)
        return jax.lax.platform_dependent(operands, *arrays, default=by(default), **branches)

    def table_specs(self, tables: dict, sharding: Sharding) -> dict:
        modules = {module.__name__: module for module in self.modules.values()}
        return {
            name: None if each is None else modules[name].table_specs(each, sharding) for name, each in tables.items()
        }


# Both passes are sharded each by itself: a `shard_map` around the `custom_vjp` would be transposed by JAX, and one
# inside it needs to know nothing of the other pass.


@with_own_gradient
def _attention(call: Call, query, key, value, sinks, rest: Operands):
    operands = dataclasses.replace(rest, query=query, key=key, value=value, sinks=sinks)
    forward = Pass(FORWARD, "forward", call, operands)

    def local(operands: Operands):
        return _nan_beyond(call.problem, operands, *forward(operands))

    operands = forward.with_tables(operands)
    return over_shards(local, forward.table_specs, operands, call.query_spec, "ql")


def _forward(call: Call, query, key, value, sinks, rest: Operands):
    # The op itself, not what it is made of: differentiated again, this is the first thing to differentiate.
    out, lse = _attention(call, query, key, value, sinks, rest)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    return (out, lse), (query, key, value, sinks, rest, out, lse)


def _backward(call: Call, residuals, cotangents):
    query, key, value, sinks, rest, out, lse = residuals
    return (*_gradients(call, query, key, value, sinks, out, lse, *cotangents, rest), None)


_attention.defvjp(_forward, _backward)

# Called outside of any `jit`, the loops would be traced and compiled anew every time.
_compiled = jax.jit(_attention, static_argnums=0)


@with_own_gradient
def _gradients(call: Call, query, key, value, sinks, out, lse, dout, dlse, rest: Operands):
    return _all_gradients(call, query, key, value, sinks, out, lse, dout, dlse, rest)


def _gradients_forward(call: Call, *arguments):
    return _gradients(call, *arguments), arguments


def _gradients_backward(call: Call, arguments, cotangents):
    *arrays, rest = arguments
    again = functools.partial(_all_gradients, call, rest=rest, differentiable=True)
    return (*jax.vjp(again, *arrays)[1](cotangents), None)


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _all_gradients(call: Call, query, key, value, sinks, out, lse, dout, dlse, rest: Operands, *, differentiable=False):
    """dq, dk, dv and dsinks."""
    operands = dataclasses.replace(rest, query=query, key=key, value=value, sinks=sinks)
    backward = Pass(DIFFERENTIABLE if differentiable else BACKWARD, "backward", call, operands)
    options = {"differentiable": True} if differentiable else {}

    def local(operands: Operands, out, lse, dout, dlse):
        # The gradient of an empty row's lse, -inf, means nothing.
        dlse = jnp.where(jnp.isneginf(lse), 0, dlse)
        delta = jnp.einsum("bthe,bthe->bht", out.astype(lse.dtype), dout.astype(lse.dtype)) - dlse
        gradients = backward(operands, dout, lse, delta, **options)
        return *gradients, None if operands.sinks is None else sink_gradients(operands.sinks, lse, delta)

    operands = backward.with_tables(operands)
    results = "qqq-" if sinks is None else "qqqb"
    arrays = out, lse, dout, dlse
    *gradients, dsinks = over_shards(local, backward.table_specs, operands, call.query_spec, results, "qlql", *arrays)
    if sinks is not None:
        # The one sum over sequences, and so over shards of the batch: left to XLA.
        dsinks = dsinks.sum(0).astype(sinks.dtype)
    primals = query, key, value, sinks
    return tuple(sharded_like(*pair) for pair in zip((*gradients, dsinks), primals, strict=True))


def _nan_beyond(problem: Problem, operands: Operands, out: Array, lse: Array) -> tuple[Array, Array]:
    """NaN where queries stand at positions that the schedule was not compiled for: better than a wrong number."""
    offset = operands.query_offset
    if offset is None or problem.schedule is None:
        return out, lse
    last = problem.schedule.query_length - out.shape[1]
    fits = ((offset >= 0) & (offset <= last))[:, None, None]
    return jnp.where(fits[..., None], out, jnp.nan), jnp.where(fits, lse, jnp.nan)
