"""The op's passes and its derivatives, whichever backend computes them.

Both passes are primitives that trace their backend when they are lowered (`deferred`), each sharded by itself. The op's
derivative is a third primitive, linear in the tangents: forward mode computes it, reverse mode transposes it into the
backward pass.
"""

import contextlib
import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from pallas_kernels.backend import Backend, DifferentiableBackend, unsupported_target_reason
from pallas_kernels.deferred import Deferred, Signature, Target
from pallas_kernels.head_place import own_rows
from pallas_kernels.modes import default_modes
from pallas_kernels.problem import Operands, Problem, accumulation_dtype
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.sharding import Sharding, operand_specs, over_shards
from pallas_kernels.softmax import sink_gradients, sink_tangents

OUT_NAME, LSE_NAME = "s2jax_out", "s2jax_lse"
"""`checkpoint_name`s of the two residuals that are worth keeping when a layer is rematerialised."""

with_own_derivative: typing.Any = functools.partial(jax.custom_jvp, nondiff_argnums=(0,))


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a call.

    Attributes:
      backends: in order of preference; the first that fits the platform and chip is taken.
      sharding: the split of batch and heads over a mesh.
      mesh: the mesh that was set.
      interpreted: True if kernels run in an interpreter, on any platform.
    """

    backends: tuple[Backend, ...]
    problem: Problem
    sharding: Sharding
    mesh: typing.Any
    interpreted: bool

    def __repr__(self) -> str:
        return " or ".join(backend.name for backend in self.backends)

    def backend(self, target: Target) -> Backend:
        """The backend that is taken.

        Raises:
          NotImplementedError: none can run on the target; the message has each one's reason.
        """
        reasons = []
        for backend in self.backends:
            if self.interpreted and backend is self.backends[-1]:
                return backend
            reason = unsupported_target_reason(backend, target.platform, target.device)
            if reason is None:
                return backend
            reasons.append(f"{backend.name}: {reason}")
        raise NotImplementedError("; ".join(reasons))

    def differentiable_backend(self, target: Target | None) -> DifferentiableBackend:
        """The backend of the tangents, and of the derivatives of gradients."""
        backend = self.backends[0] if target is None else self.backend(target)
        return typing.cast(DifferentiableBackend, backend.differentiable)

    def problem_of(self, backend: Backend, target: Target | None) -> Problem:
        """The problem for a backend: without the config of another, with the platform."""
        config = self.problem.config if isinstance(self.problem.config, backend.config_type) else None
        return dataclasses.replace(self.problem, config=config, platform=None if target is None else target.platform)

    def own_tables(self, backend: Backend, operands: Operands, tables, sharding: Sharding):
        """The rows of the tables that belong to the heads of a call or shard, if a caller split the heads."""
        schedule = operands.schedule
        if operands.first_head is None or not isinstance(schedule, BlockSchedule):
            return tables
        num_heads, total = operands.query.shape[2], schedule.num_heads
        return own_rows(tables, backend.table_specs, operands.first_head, num_heads, total)

    def with_tables(self, backend: Backend, operands: Operands, tables) -> Operands:
        """The operands of a call or a shard, with its own heads' rows of a backend's tables."""
        if not self.sharding.every:
            tables = self.own_tables(backend, operands, tables, self.sharding)
        return dataclasses.replace(operands, tables=tables, first_head=None)

    def split_tables(self, backend: Backend, signature: Signature, leaves, tables):
        """The tables that are split over a mesh, and their specs.

        They are those of the call's heads, if a caller split the heads beforehand.
        """
        operands: Operands = signature.unflatten(leaves)[0]
        if operands.first_head is not None and isinstance(operands.schedule, BlockSchedule) and self.sharding.every:
            if signature.maps:
                raise NotImplementedError("head_axis or heads inside a vmap needs a mesh whose axes are all mapped")
            tables = self.own_tables(backend, operands, tables, self.sharding)
        return tables, None if tables is None else backend.table_specs(tables, self.sharding)

    @contextlib.contextmanager
    def tracing(self, name: str, backend: Backend):
        """A context to trace a backend's pass in: the mesh of the call, a name for profiles."""
        with contextlib.ExitStack() as stack:
            if self.sharding.every:
                stack.enter_context(jax.sharding.use_abstract_mesh(self.mesh))
            if backend.platform is not None:
                stack.enter_context(default_modes())
            stack.enter_context(jax.named_scope(f"{backend.name}_{name}"))
            yield


def _compute_forward(call: Call, signature: Signature, target: Target, *leaves) -> tuple[Array, Array]:
    """out [b, t, h, e], and lse [b, h, t], finite."""
    (operands,) = signature.one(map(jax.typeof, leaves))
    backend, sharding = call.backend(target), call.sharding
    problem = call.problem_of(backend, target)
    with call.tracing("forward", backend):
        tables = call.split_tables(backend, signature, leaves, backend.forward_tables(problem, operands))

        def local(tables, operands: Operands):
            out, lse = backend.forward(problem, call.with_tables(backend, operands, tables))
            out, lse = _nan_beyond(operands, out, lse)
            return out, _finite(lse)

        in_specs, out_specs = (operand_specs(sharding, operands),), (sharding.of_tokens(), sharding.of_rows())
        return over_shards(local, sharding, signature, leaves, in_specs, out_specs, tables)


def _forward_types(call: Call, operands: Operands) -> list:
    query: typing.Any = operands.query
    batch, length, heads, _ = query.shape
    spec = call.sharding.of_tokens() if call.sharding.explicit else query.sharding.spec
    dtype = accumulation_dtype(query.dtype)
    return [
        _typed(query, (batch, length, heads, operands.value.shape[3]), query.dtype, spec),
        _typed(query, (batch, heads, length), dtype, PartitionSpec(spec[0], spec[2], None)),
    ]


def _typed(like, shape: tuple, dtype, spec: PartitionSpec):
    """The type of a result: it varies over the axes of a caller's `shard_map` that an argument varies over."""
    return like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=like.sharding.update(spec=spec))


def _compute_gradients(
    call: Call, signature: Signature, target: Target | None, *leaves, differentiable: bool = False
) -> tuple:
    """dq, dk, dv and dsinks, if there are sinks."""
    operands: Operands = signature.one(map(jax.typeof, leaves))[0]
    if differentiable:
        backend = call.differentiable_backend(target)
        compute = functools.partial(backend.backward, differentiable=True)
    else:
        backend = call.backend(typing.cast(Target, target))
        compute = backend.backward
    problem, sharding = call.problem_of(backend, target), call.sharding
    with call.tracing("backward", backend):
        tables = call.split_tables(backend, signature, leaves, backend.backward_tables(problem, operands))

        def local(tables, operands: Operands, out, lse, dout, dlse):
            # The gradient of an empty row's lse means nothing.
            dlse = jnp.where(_is_empty(lse), 0, dlse)
            lse = with_infinities(lse)
            delta = jnp.einsum("bthe,bthe->bht", out.astype(lse.dtype), dout.astype(lse.dtype)) - dlse
            operands = call.with_tables(backend, operands, tables)
            gradients = compute(problem, operands, dout, lse, delta)
            return gradients if operands.sinks is None else (*gradients, sink_gradients(operands.sinks, lse, delta))

        tokens, rows = sharding.of_tokens(), sharding.of_rows()
        in_specs = operand_specs(sharding, operands), tokens, rows, tokens, rows
        out_specs = tokens, tokens, tokens, *([] if operands.sinks is None else [sharding.of_heads()])
        gradients = over_shards(local, sharding, signature, leaves, in_specs, out_specs, tables)
        if operands.sinks is not None:
            # The one sum over sequences, and so over shards of the batch: left to XLA.
            gradients = *gradients[:3], gradients[3].sum(-2).astype(operands.sinks.dtype)
        primals = operands.query, operands.key, operands.value, operands.sinks
        return tuple(_sharded_like(signature, *pair) for pair in zip(gradients, primals, strict=False))


def _sharded_like(signature: Signature, gradient: Array, primal) -> Array:
    """The gradient, sharded as its primal: over Explicit axes that is part of the type."""
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return gradient
    before = [mapped.mesh_axes or None for mapped in reversed(signature.maps)]
    return jax.sharding.reshard(gradient, PartitionSpec(*before, *primal.sharding.spec))


def _gradient_types(call: Call, operands: Operands, *_) -> list:
    primals: typing.Any = operands.query, operands.key, operands.value, operands.sinks
    return [each.update(weak_type=False) for each in primals if each is not None]


def _compute_tangents(
    call: Call, signature: Signature, target: Target | None, *leaves, differentiable: bool = False
) -> tuple[Array, Array]:
    """The tangents of out and lse, from those of query, key, value and sinks; an absent one is zero."""
    operands, _, _, moved = signature.one(map(jax.typeof, leaves))
    backend, sharding = call.differentiable_backend(target), call.sharding
    problem = call.problem_of(backend, target)
    with call.tracing("tangents", backend):
        tables = call.split_tables(backend, signature, leaves, backend.forward_tables(problem, operands))

        def local(tables, operands: Operands, out, lse, moved):
            operands, lse = call.with_tables(backend, operands, tables), with_infinities(lse)
            *tokens, sinks = moved
            dout, dlse = backend.tangents(problem, operands, lse, *tokens, differentiable=differentiable)
            if operands.sinks is not None and sinks is not None:
                dlse = dlse + sink_tangents(operands.sinks, sinks, lse)
            # The weights, sinks included, sum to one: they move against each other.
            dout = dout - dlse.swapaxes(1, 2)[..., None] * out.astype(dout.dtype)
            return dout.astype(out.dtype), dlse

        tokens, rows = sharding.of_tokens(), sharding.of_rows()
        specs = tokens, tokens, tokens, sharding.of(heads=0, ndim=1)
        moved_specs = tuple(None if each is None else spec for each, spec in zip(moved, specs, strict=True))
        in_specs = operand_specs(sharding, operands), tokens, rows, moved_specs
        return over_shards(local, sharding, signature, leaves, in_specs, (tokens, rows), tables)


def _tangent_types(call: Call, operands: Operands, out, lse, moved) -> list:
    return [out.update(weak_type=False), lse.update(weak_type=False)]


FORWARD = Deferred("s2jax_forward", _compute_forward, _forward_types)
BACKWARD = Deferred("s2jax_backward", _compute_gradients, _gradient_types)
TANGENTS = Deferred("s2jax_tangents", _compute_tangents, _tangent_types)


def _run(deferred: Deferred, call: Call, *arguments) -> tuple[Array, ...]:
    if not call.interpreted:
        return tuple(deferred(call, *arguments))
    # Interpreters run callbacks, whose effects JAX has to see in what it traces.
    leaves, structure = jax.tree.flatten(arguments)
    return deferred.compute(call, Signature(structure), Target(jax.default_backend()), *leaves)


@with_own_derivative
def attention(call: Call, operands: Operands) -> tuple[Array, ...]:
    """out, and lse by its finite stand-in."""
    return _run(FORWARD, call, operands)


@functools.partial(attention.defjvp, symbolic_zeros=True)
def _attention_jvp(call: Call, primals: tuple[Operands], tangents: tuple[Operands]):
    (operands,), (moved,) = primals, tangents
    # The op itself, not what it is made of: differentiated again, this is the first thing to differentiate.
    out, lse = attention(call, operands)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    of_inputs = moved.query, moved.key, moved.value, moved.sinks
    of_inputs = tuple(None if isinstance(each, SymbolicZero) else each for each in of_inputs)
    return (out, lse), tuple(TANGENTS(call, operands, out, lse, of_inputs))


@with_own_derivative
def _gradients(call: Call, operands: Operands, out, lse, dout, dlse) -> tuple[Array, ...]:
    """dq, dk, dv and dsinks, if there are sinks."""
    return _run(BACKWARD, call, operands, out, lse, dout, dlse)


@_gradients.defjvp
def _gradients_jvp(call: Call, primals: tuple, tangents: tuple):
    leaves, structure = jax.tree.flatten(primals)
    again = functools.partial(_compute_gradients, call, Signature(structure), None, differentiable=True)
    return _gradients(call, *primals), _tangents_of(again, leaves, jax.tree.leaves(tangents))


def _tangents_of(function, leaves: list, tangents: list) -> tuple:
    """Tangents of the results; whole numbers have none."""
    places = [place for place, each in enumerate(leaves) if jnp.issubdtype(each.dtype, jnp.inexact)]

    def of_floats(*floats):
        given = dict(zip(places, floats, strict=True))
        return function(*(given.get(place, each) for place, each in enumerate(leaves)))

    floats, moved = ([arrays[place] for place in places] for arrays in (leaves, tangents))
    return tuple(jax.jvp(of_floats, floats, moved)[1])


def _tangents_jvp(primals, tangents, *, static: Call, signature: Signature):
    again = functools.partial(_compute_tangents, static, signature, None, differentiable=True)
    moved = _tangents_of(again, list(primals), [ad.instantiate_zeros(each) for each in tangents])
    return TANGENTS.bind(primals, static, signature), moved


def _tangents_transpose(cotangents, *leaves, static: Call, signature: Signature):
    """The backward pass."""
    *_, moved = signature.unflatten(range(len(leaves)))
    places = [each for each in moved if each is not None]
    known = leaves[: len(leaves) - len(places)]
    cotangents = [ad.instantiate_zeros(each) for each in cotangents]
    operands, out, lse, _ = signature.unflatten(range(len(leaves)))
    structure = jax.tree.structure((operands, out, lse, *cotangents))
    maps = tuple(
        dataclasses.replace(mapped, axes=(*mapped.axes[: len(known)], *(0 for _ in cotangents)))
        for mapped in signature.maps
    )
    gradients = Signature(structure, maps).again(functools.partial(_gradients, static))(*known, *cotangents)
    wanted = dict(zip(range(4), gradients, strict=False))
    found: list = [None] * len(known)
    for number, place in enumerate(moved):
        if place is not None:
            each = ad.is_undefined_primal(leaves[place])
            found.append(signature.as_argument(wanted[number], place) if each else None)
    return found


ad.primitive_jvps[TANGENTS.primitive] = _tangents_jvp
ad.primitive_transposes[TANGENTS.primitive] = _tangents_transpose


def _is_empty(lse: Array) -> Array:
    """Rows that read nothing, found by the finite stand-in of their lse."""
    return lse == jnp.finfo(lse.dtype).min


def _finite(lse: Array) -> Array:
    """lse with a finite stand-in for -inf: what JAX's `debug_infs` complains of may leave no compiled function."""
    return jnp.where(jnp.isneginf(lse), jnp.finfo(lse.dtype).min, lse)


def with_infinities(lse: Array) -> Array:
    """lse with -inf where a row reads nothing, from its finite stand-in."""
    # Added rather than selected: the derivative keeps nothing.
    return lse + jax.lax.stop_gradient(jnp.where(_is_empty(lse), -jnp.inf, jnp.zeros_like(lse)))


def _nan_beyond(operands: Operands, out: Array, lse: Array) -> tuple[Array, Array]:
    """NaN where queries stand at positions that the schedule was not compiled for: better than a wrong number."""
    schedule, offset = operands.schedule, operands.query_offset
    if offset is None or not isinstance(schedule, BlockSchedule):
        return out, lse
    last = schedule.query_length - out.shape[1]
    fits = ((offset >= 0) & (offset <= last))[:, None, None]
    return jnp.where(fits[..., None], out, jnp.nan), jnp.where(fits, lse, jnp.nan)
