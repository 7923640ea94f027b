"""Attention by a pattern, and the combination of partial results."""

import typing

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from pallas_kernels import BlockSelection, block_sparse_attention, softmax
from pallas_kernels.head_place import HeadAxis, HeadRange, all_heads, possible_head_axes
from pallas_kernels.op import Options
from pallas_kernels.unknown_arguments import explains_unknown_arguments
from s2jax.compiler import check_heads_known, compile_schedule
from s2jax.patterns import Pattern, PatternLike, TokenMask, as_pattern


@typing.overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: PatternLike | BlockSelection,
    *,
    return_lse: typing.Literal[False] = False,
    **options: typing.Unpack[Options],
) -> Array: ...
@typing.overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: PatternLike | BlockSelection,
    *,
    return_lse: typing.Literal[True],
    **options: typing.Unpack[Options],
) -> tuple[Array, Array]: ...
@typing.overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: PatternLike | BlockSelection,
    *,
    return_lse: bool,
    **options: typing.Unpack[Options],
) -> Array | tuple[Array, Array]: ...
@explains_unknown_arguments
def attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k e"],
    pattern: PatternLike | BlockSelection,
    *,
    scale: float | None = None,
    query_offset: int | Integer[Array, ""] | Integer[Array, " b"] = 0,
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
    """Attention in which every query head reads the keys that a pattern gives it.

    Query head i reads KV head i // (h / k). Softmax and sums are in float32, or float64 for float64 inputs.

    Args:
      query: [b, t, h, d]; bfloat16, float16, float32 or float64.
      key: [b, s, k, d], of the query's dtype.
      value: [b, s, k, e], of the query's dtype.
      pattern: a pattern such as `s2jax.LocalStride()`, or its text; a function mask_mod(head, query_position,
        key_position) -> bool, made causal as by `s2jax.MaskMod`; a concrete bool array [h or 1, t, s], True where the
        query reads the key; or a `BlockSelection` made under `jit`.
      scale: factor of the logits; d**-0.5 by default.
      query_offset: position of the first query among the keys. Known at run time only, it may be a scalar array or [b],
        each between 0 and s; with a pattern, the result for others is NaN.
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
    at_run_time = None
    if isinstance(pattern, BlockSelection):
        schedule = pattern
        if _is_static(query_offset) and typing.cast(int, query_offset) < 0:
            raise ValueError(f"query_offset must be an integer of at least 0, got {query_offset!r}")
        if not _is_static(query_offset) or query_offset:
            at_run_time = query_offset
    else:
        for name, array in (("query", query), ("key", key)):
            if getattr(array, "ndim", None) != 4:
                came = getattr(array, "shape", type(array).__name__)
                raise ValueError(f"{name} must be an array [batch, length, heads, features], got {came}")
        query_length, kv_length, offset = query.shape[1], key.shape[1], 0
        counts = query.shape[2], key.shape[2]
        num_heads, num_kv_heads = all_heads(head_axis, heads, *counts)
        if _is_static(query_offset):
            offset = int(typing.cast(int, query_offset))
        else:
            at_run_time = query_offset
        static = _static_pattern(pattern, query_length, kv_length, None if at_run_time is not None else offset)
        if at_run_time is not None:
            # Rows for every position that may come.
            query_length += kv_length
        if head_axis is None and heads is None:
            check_heads_known(static, possible_head_axes(query), *counts, query_length, kv_length, offset)
        schedule = compile_schedule(
            static,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            query_length=query_length,
            kv_length=kv_length,
            query_offset=offset,
        )
    return block_sparse_attention(
        query, key, value, schedule,
        scale=scale, query_offset=at_run_time, query_segment_ids=query_segment_ids, kv_segment_ids=kv_segment_ids,
        logits_soft_cap=logits_soft_cap, sinks=sinks, return_lse=return_lse, query_spec=query_spec,
        head_axis=head_axis, heads=heads, implementation=implementation, config=config,
    )  # fmt: skip


ATTENTION_OPTIONS = (*typing.get_type_hints(Options), "return_lse")
"""Names of the keyword arguments of `attention`."""


def _static_pattern(given: PatternLike, query_length: int, kv_length: int, offset: int | None) -> Pattern:
    """The pattern; a bool array becomes one for exactly these queries and keys. `offset` is None if not static."""
    if not isinstance(given, (np.ndarray, jax.Array)):
        return as_pattern(given)
    if offset is None:
        raise ValueError(
            "a bool array says what these very queries read, so their position means nothing: leave query_offset at 0"
        )
    mask = TokenMask(given, query_offset=offset)
    if mask.mask.shape[1:] != (query_length, kv_length):
        raise ValueError(
            f"a bool array in the pattern's place must be [heads or 1, t, s] with t={query_length} queries, "
            f"s={kv_length} keys, got {list(mask.mask.shape)}; s2jax.TokenMask may reach further than the input"
        )
    return mask


def _is_static(query_offset) -> bool:
    return isinstance(query_offset, (int, np.integer)) and not isinstance(query_offset, bool)


def combine(outs: list[Float[Array, "b t h e"]], lses: list[Float[Array, "b h t"]]):
    """Merges attention over disjoint sets of keys into attention over all of them, exactly.

    Every part is weighed with exp(lse), as FlashAttention does with its tiles. Differentiable, also for rows that read
    nothing in some or all parts. Only one part may have sinks.

    Args:
      outs: results of `attention(..., return_lse=True)`, all of one shape.
      lses: their log-sum-exps [b, h, t].

    Returns:
      out [b, t, h, e] in the outs' dtype, lse [b, h, t].

    Raises:
      ValueError: no parts, or parts that do not fit together.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"combine needs as many outs as lses, at least one, got {len(outs)} and {len(lses)}")
    shape = outs[0].shape
    if len(shape) != 4 or any(out.shape != shape or out.dtype != outs[0].dtype for out in outs):
        raise ValueError(
            "combine needs outs of one shape [b, t, h, e] and one dtype, got "
            + ", ".join(f"{out.dtype} {out.shape}" for out in outs)
        )
    if any(lse.shape != (shape[0], shape[2], shape[1]) for lse in lses):
        raise ValueError(
            f"combine needs lses {(shape[0], shape[2], shape[1])} for outs {shape}, got "
            + ", ".join(str(lse.shape) for lse in lses)
        )
    return softmax.combine(outs, lses)
