"""The public op."""

import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from pallas_kernels.backend import choose
from pallas_kernels.caching import bounded_jit
from pallas_kernels.checks import check_flag, check_number, check_operands
from pallas_kernels.head_place import HeadAxis, HeadRange
from pallas_kernels.modes import interpreted
from pallas_kernels.passes import LSE_NAME, OUT_NAME, Call, attention, with_infinities
from pallas_kernels.problem import Operands, Problem, accumulation_dtype
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection
from pallas_kernels.sharding import UNSHARDED, equally_varying, find_sharding
from pallas_kernels.unknown_arguments import explains_unknown_arguments

__all__ = ["LSE_NAME", "OUT_NAME", "block_sparse_attention"]


class Options(typing.TypedDict, total=False):
    """Keyword arguments of the op, but for `return_lse`, by which the type of its result goes."""

    scale: float | None
    query_offset: typing.Any
    query_segment_ids: Array | None
    kv_segment_ids: Array | None
    logits_soft_cap: float | None
    sinks: Array | None
    query_spec: PartitionSpec | None
    head_axis: HeadAxis
    heads: HeadRange
    implementation: str | list[str] | tuple[str, ...] | None
    config: typing.Any


Scheduled = BlockSchedule | BlockSelection


@typing.overload
def block_sparse_attention(
    query: Array,
    key: Array,
    value: Array,
    schedule: Scheduled,
    *,
    return_lse: typing.Literal[False] = False,
    **options: typing.Unpack[Options],
) -> Array: ...
@typing.overload
def block_sparse_attention(
    query: Array,
    key: Array,
    value: Array,
    schedule: Scheduled,
    *,
    return_lse: typing.Literal[True],
    **options: typing.Unpack[Options],
) -> tuple[Array, Array]: ...
@typing.overload
def block_sparse_attention(
    query: Array, key: Array, value: Array, schedule: Scheduled, *, return_lse: bool, **options: typing.Unpack[Options]
) -> Array | tuple[Array, Array]: ...
@explains_unknown_arguments
def block_sparse_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k e"],
    schedule: BlockSchedule | BlockSelection,
    *,
    scale: float | None = None,
    query_offset: int | Integer[Array, ""] | Integer[Array, " b"] | None = None,
    query_segment_ids: Integer[Array, "b t"] | None = None,
    kv_segment_ids: Integer[Array, "b s"] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " h"] | None = None,
    return_lse: bool = False,
    query_spec: PartitionSpec | None = None,
    head_axis: HeadAxis = None,
    heads: HeadRange = None,
    implementation: str | list[str] | tuple[str, ...] | None = None,
    config=None,
) -> typing.Any:
    """Attention in which every query reads the blocks of keys that a schedule lists for its head.

    Query head i reads KV head i // (h / k). Softmax and sums are in float32, or float64 for float64 inputs.

    Args:
      query: [b, t, h, d]; bfloat16, float16, float32 or float64.
      key: [b, s, k, d], of the query's dtype.
      value: [b, s, k, e], of the query's dtype.
      schedule: a compiled pattern, or a `BlockSelection` made under `jit`.
      scale: factor of the logits; d**-0.5 by default.
      query_offset: position of the first query among the keys, known at run time only: a scalar or [b]. The schedule
        must be compiled from position 0 on for all positions that may come; the result for others is NaN.
      query_segment_ids: integers [b, t]. Queries see the keys with an equal id only; no id is special. Goes together
        with `kv_segment_ids`.
      kv_segment_ids: integers [b, s].
      logits_soft_cap: logits become cap · tanh(logits / cap). "mosaic_gpu" uses the GPU's approximate tanh.
      sinks: [h], one more logit per query head in the softmax's sum, neither scaled nor capped.
      return_lse: returns (out, lse) in place of out.
      query_spec: sharding of the query over a mesh with Auto axes, such as P(batch, None, heads, None). The mesh must
        be set with `jax.set_mesh`; without it, XLA gathers sharded arrays.
      head_axis: axis of a caller's `shard_map`, `pmap` or named `vmap` over which heads are split, or several; each
        shard then reads by its heads' numbers among all heads. () means that this call has all heads. Needed inside
        of such a region if heads read differently; a `BlockSelection` has its own heads.
      heads: (first_head, num_heads) in place of `head_axis`, for heads that are split otherwise: the number of this
        call's first query head, and the count of all query heads. The first head may be an array; the result for an
        impossible one is NaN.
      implementation: "mosaic_gpu", "mosaic_tpu", "xla" or "reference", or several names in order of preference. None
        picks by the platform that is lowered for, for each platform of an export.
      config: tile sizes of the one implementation asked for: `HopperConfig`, `TpuConfig` or `XlaConfig`.

    Returns:
      out [b, t, h, e] in the query's dtype. With `return_lse` also lse [b, h, t] in float32 (float64 for float64): the
      natural logarithm of the sum of exp(logit) over the keys that the row reads and its sink. A row that reads
      nothing has zeros in out, and the sink or -inf as its lse.

    Raises:
      ValueError: an argument does not fit; the message says what was expected and what came.
      NotImplementedError: none of the implementations asked for supports the arguments; the message has each reason.
    """
    return_lse = check_flag("return_lse", return_lse)
    operands, fits = check_operands(
        schedule, query, key, value, query_offset, query_segment_ids, kv_segment_ids, sinks, head_axis, heads
    )
    problem = Problem(
        scale=query.shape[-1] ** -0.5 if scale is None else check_number("scale", scale),
        logits_soft_cap=None if logits_soft_cap is None else check_number("logits_soft_cap", logits_soft_cap, above=0),
        config=config,
        # One object, for whether two arrays are equal is not known while tracing.
        same_segments=query_segment_ids is not None and query_segment_ids is kv_segment_ids,
    )
    operands = equally_varying(operands)
    call = Call(
        choose(problem, operands, implementation),
        problem,
        find_sharding(jax.typeof(operands.query), operands.key.shape[2], query_spec) or UNSHARDED,
        jax.sharding.get_abstract_mesh(),
        interpreted(),
    )
    return _attend(call, return_lse, operands, fits)


# Called outside of any `jit`, it would be compiled in pieces.
@bounded_jit(2)
def _attend(call: Call, return_lse: bool, operands: Operands, fits: Array | None):
    with jax.named_scope("s2jax_attention"):
        out, lse = attention(call, operands) if operands.query.shape[0] != 0 else _of_no_sequences(operands)
        if fits is not None:
            out, lse = (jnp.where(fits, each, jnp.nan) for each in (out, lse))
        return (out, with_infinities(lse)) if return_lse else out


def _of_no_sequences(operands: Operands) -> tuple[Array, Array]:
    """out [0, t, h, e] and lse [0, h, t]: a batch of none."""
    query, features = operands.query, operands.value.shape[3]
    out = jnp.broadcast_to(query[..., :1], (*query.shape[:3], features))
    return out, query[..., 0].swapaxes(1, 2).astype(accumulation_dtype(query.dtype))
