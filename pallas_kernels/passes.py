"""The op's passes and its derivatives, whichever backend computes them.

Both passes are primitives that trace their backend when they are lowered (`deferred`), each sharded by itself. The op's
derivative is a third primitive, linear in the tangents: forward mode computes it, reverse mode transposes it into the
backward pass.
"""

import contextlib
import dataclasses
import functools
import types
import typing

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from pallas_kernels import mosaic_gpu, mosaic_tpu, reference, xla
from pallas_kernels.deferred import Deferred, Signature, Target
from pallas_kernels.head_place import own_rows
from pallas_kernels.platforms import PLATFORMS, default_modes
from pallas_kernels.problem import Operands, Problem, accumulation_dtype
from pallas_kernels.sharding import Sharding, operand_specs, over_shards, spec_of
from pallas_kernels.softmax import sink_gradients, sink_tangents

OUT_NAME, LSE_NAME = "s2jax_out", "s2jax_lse"
"""`checkpoint_name`s of the two residuals that are worth keeping when a layer is rematerialised."""

with_own_derivative: typing.Any = functools.partial(jax.custom_jvp, nondiff_argnums=(0,))

MODULES: dict[str, types.ModuleType] = {
    "xla": xla,
    "mosaic_gpu": mosaic_gpu,
    "mosaic_tpu": mosaic_tpu,
    "reference": reference,
}
DIFFERENTIABLE: dict[str, types.ModuleType] = MODULES | {"mosaic_gpu": xla, "mosaic_tpu": xla}
"""Which module computes the passes of each implementation; and its tangents, and what is differentiated again."""


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a call.

    Attributes:
      implementations: names, in order of preference; the first that is for the platform and chip is taken.
      sharding: how batch and heads are split over a mesh, or None.
      mesh: the one that was set.
      interpreted: whether kernels run in an interpreter, on any platform.
    """

    implementations: tuple[str, ...]
    problem: Problem
    sharding: Sharding | None
    mesh: typing.Any
    interpreted: bool

    def __repr__(self) -> str:
        return " or ".join(self.implementations)

    def implementation(self, target: Target) -> str:
        """The name of the one that is taken; raises NotImplementedError where there is none."""
        reasons = []
        for name in self.implementations:
            reason = self._refuse(name, target)
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
        raise NotImplementedError("; ".join(reasons))

    def _refuse(self, name: str, target: Target) -> str | None:
        """Why an implementation cannot run on the target."""
        if name not in PLATFORMS or (self.interpreted and name == self.implementations[-1]):
            return None
        if PLATFORMS[name] != target.platform:
            return (
                f"needs the platform {PLATFORMS[name]!r}, and this is lowered for {target.platform!r}; take "
                f'implementation=None, or ["{name}", "xla"]'
            )
        return MODULES[name].unsupported_device_reason(target.device)

    def problem_of(self, module: types.ModuleType, target: Target | None) -> Problem:
        """The problem for a module: without the tiles of another, with the platform."""
        config = self.problem.config if isinstance(self.problem.config, module.CONFIG) else None
        return dataclasses.replace(self.problem, config=config, platform=None if target is None else target.platform)

    def with_tables(self, module: types.ModuleType, operands: Operands, tables) -> Operands:
        """The operands of a call or a shard, with its own heads' rows of a module's tables."""
        schedule = self.problem.schedule
        if operands.first_head is not None and schedule is not None and self.sharding is None:
            num_heads, total = operands.query.shape[2], schedule.num_heads
            tables = own_rows(tables, module.table_specs, operands.first_head, num_heads, total)
        return dataclasses.replace(operands, tables=tables, first_head=None)

    def shared_tables(self, module: types.ModuleType, signature: Signature, leaves, tables):
        """The tables that are split over a mesh: those of the call's heads, where a caller split them beforehand."""
        first_head = signature.unflatten(leaves)[0].first_head
        if first_head is None or self.problem.schedule is None or self.sharding is None:
            return tables
        if signature.maps:
            raise NotImplementedError("head_axis or heads inside a vmap needs a mesh whose axes are all mapped already")
        num_heads = signature.one(map(jax.typeof, leaves))[0].query.shape[2]
        return own_rows(tables, module.table_specs, first_head, num_heads, self.problem.schedule.num_heads)

    @contextlib.contextmanager
    def tracing(self, name: str, module: types.ModuleType):
        """A context to trace a module's pass in: the mesh of the call, a name for profiles."""
        with contextlib.ExitStack() as stack:
            if self.sharding is not None:
                stack.enter_context(jax.sharding.use_abstract_mesh(self.mesh))
            if module in (mosaic_gpu, mosaic_tpu):
                stack.enter_context(default_modes())
            stack.enter_context(jax.named_scope(f"{module.__name__.rpartition('.')[2]}_{name}"))
            yield


def _compute_forward(call: Call, signature: Signature, target: Target, *leaves) -> tuple[Array, Array]:
    """out [b, t, h, e], and lse [b, h, t], finite."""
    (operands,) = signature.one(map(jax.typeof, leaves))
    module = MODULES[call.implementation(target)]
    problem = call.problem_of(module, target)
    with call.tracing("forward", module):
        tables = call.shared_tables(module, signature, leaves, module.forward_tables(problem, operands))

        def local(tables, operands: Operands):
            out, lse = module.forward(problem, call.with_tables(module, operands, tables))
            out, lse = _nan_beyond(problem, operands, out, lse)
            return out, _finite(lse)

        specs = (operand_specs(call.sharding, operands),)
        return over_shards(local, call.sharding, signature, leaves, specs, "ql", tables, module.table_specs)


def _forward_types(call: Call, operands: Operands) -> list:
    query: typing.Any = operands.query
    batch, length, heads, _ = query.shape
    spec = query.sharding.spec
    if call.sharding is not None and call.sharding.explicit:
        spec = call.sharding.of(0, 2)
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
    name = call.implementations[0] if target is None else call.implementation(target)
    module = (DIFFERENTIABLE if differentiable else MODULES)[name]
    problem = call.problem_of(module, target)
    options = {"differentiable": True} if differentiable else {}
    with call.tracing("backward", module):
        tables = call.shared_tables(module, signature, leaves, module.backward_tables(problem, operands))

        def local(tables, operands: Operands, out, lse, dout, dlse):
            # The gradient of an empty row's lse means nothing.
            dlse = jnp.where(_is_empty(lse), 0, dlse)
            lse = with_infinities(lse)
            delta = jnp.einsum("bthe,bthe->bht", out.astype(lse.dtype), dout.astype(lse.dtype)) - dlse
            operands = call.with_tables(module, operands, tables)
            gradients = module.backward(problem, operands, dout, lse, delta, **options)
            return gradients if operands.sinks is None else (*gradients, sink_gradients(operands.sinks, lse, delta))

        specs = operand_specs(call.sharding, operands), *(spec_of(call.sharding, kind) for kind in "qlql")
        results = "qqq" if operands.sinks is None else "qqqb"
        gradients = over_shards(local, call.sharding, signature, leaves, specs, results, tables, module.table_specs)
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
    """The tangents of out and lse, linear in those of query, key, value and sinks."""
    operands, _, _, moved = signature.one(map(jax.typeof, leaves))
    name = call.implementations[0] if target is None else call.implementation(target)
    module = DIFFERENTIABLE[name]
    problem = call.problem_of(module, target)
    with call.tracing("tangents", module):
        tables = call.shared_tables(module, signature, leaves, module.forward_tables(problem, operands))

        def local(tables, operands: Operands, out, lse, moved):
            operands, lse = call.with_tables(module, operands, tables), with_infinities(lse)
            *tokens, sinks = moved
            dout, dlse = module.tangents(problem, operands, lse, *tokens, differentiable=differentiable)
            if operands.sinks is not None and sinks is not None:
                dlse = dlse + sink_tangents(operands.sinks, sinks, lse)
            # Of a softmax that sums to one, sinks included: the weights move against each other.
            dout = dout - dlse.swapaxes(1, 2)[..., None] * out.astype(dout.dtype)
            return dout.astype(out.dtype), dlse

        of_sinks = None if call.sharding is None else call.sharding.of(heads=0, ndim=1)
        kinds = [spec_of(call.sharding, "q")] * 3 + [of_sinks]
        of_moved = [None if each is None else spec for each, spec in zip(moved, kinds, strict=True)]
        specs = operand_specs(call.sharding, operands), spec_of(call.sharding, "q"), spec_of(call.sharding, "l")
        specs = *specs, tuple(of_moved)
        return over_shards(local, call.sharding, signature, leaves, specs, "ql", tables, module.table_specs)


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


def _nan_beyond(problem: Problem, operands: Operands, out: Array, lse: Array) -> tuple[Array, Array]:
    """NaN where queries stand at positions that the schedule was not compiled for: better than a wrong number."""
    offset = operands.query_offset
    if offset is None or problem.schedule is None:
        return out, lse
    last = problem.schedule.query_length - out.shape[1]
    fits = ((offset >= 0) & (offset <= last))[:, None, None]
    return jnp.where(fits[..., None], out, jnp.nan), jnp.where(fits, lse, jnp.nan)
