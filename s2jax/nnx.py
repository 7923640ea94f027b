"""Sparsely-sharded attention as a Flax NNX layer, and as `attention_fn` of `nnx.MultiHeadAttention`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.head_place import HeadAxis
from pallas_kernels.unknown_arguments import explains_unknown_arguments
from s2jax.cache import KVCache
from s2jax.flax_adapter import attention_fn
from s2jax.functional import attention
from s2jax.layers import (
    LayerHeads,
    as_layer_pattern,
    cache_positions,
    check_layer,
    check_self_attention,
    head_counts,
    output_sharding,
    sum_over,
)
from s2jax.rotary import RopeScaling, normalize_and_rotate

__all__ = ["S2Attention", "attention_fn"]


class S2Attention(nnx.Module):
    """Multi-head attention in which each head reads the keys that a pattern gives it.

    Projects to queries, keys and values, optionally normalises and rotates queries and keys, attends, and projects
    back. Parameters, named and shaped as in `nnx.MultiHeadAttention` and in `s2jax.linen.S2Attention`:

        query.kernel [f, h, d]   key.kernel [f, k, d]   value.kernel [f, k, d]   out.kernel [h, d, out_features]
        query.bias [h, d]        key.bias [k, d]        value.bias [k, d]        out.bias [out_features]   (use_bias)
        query_gain [d], key_gain [d] (qk_norm)          sinks [h] (use_sinks)

    The layer keeps no other state: a KV cache is passed in and returned, see `create_cache`. Under `jax.jit` over a
    mesh with Auto axes, `query_spec` is needed.

    Args:
        in_features: width `f` of the input.
        num_heads: query heads `h`.
        pattern: the pattern by which heads read keys, such as `s2jax.LocalStride(...)`, or anything that
            `s2jax.as_pattern` takes: text, a function, a bool array [h or 1, t, s] as long as the longest input.
        num_kv_heads: KV heads `k`, a divisor of `h`; by default `h`.
        head_dim: `d`, by default `in_features / num_heads`.
        out_features: width of the output, by default `in_features`.
        use_bias: adds a bias to each of the four projections.
        dtype: dtype of the computation, by default the promotion of those of input and parameters.
        param_dtype: dtype of the parameters.
        precision: `jax.lax.Precision` of the four projections.
        kernel_init: initializer of the four kernels.
        out_kernel_init: initializer of the output kernel, by default `kernel_init`.
        rope_theta: base of the rotary positions; None leaves queries and keys unrotated.
        rope_scaling: scaling of the rotary frequencies, as in Llama 3.1.
        qk_norm: RMS-normalises each head of q and k, with a learned gain. (Without a gain the logits could not exceed
            `d ** 0.5`, which costs quality.)
        norm_eps: added to the mean square under `qk_norm`.
        use_sinks: adds one learned logit per query head to each softmax; it has no value.
        scale: multiplies the logits, by default `head_dim ** -0.5`.
        logits_soft_cap: logits become `cap * tanh(logits / cap)`.
        query_spec: `PartitionSpec` of the queries [b, t, h, d] on a mesh with Auto axes.
        head_axis: axis of a caller's `shard_map`, `pmap` or named `vmap` over which the parameters are split by heads
            (`out.kernel` too), or several. `num_heads` counts all heads; inside, the layer has the shard's heads and
            sums its output over the axis. () means that the parameters are always those of all heads.
        implementation: backend or backends to use, see `s2jax.attention`.
        rngs: source of the initial parameters.

    Raises:
        ValueError: the head counts do not fit together, or an argument has an impossible value.
    """

    @explains_unknown_arguments
    def __init__(
        self,
        in_features: int,
        num_heads: int,
        pattern: Any,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        rope_theta: float | None = None,
        rope_scaling: RopeScaling | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        use_sinks: bool = False,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        query_spec: PartitionSpec | None = None,
        head_axis: HeadAxis = None,
        implementation: str | tuple[str, ...] | None = None,
        rngs: nnx.Rngs,
    ):
        num_kv_heads, head_dim = head_counts(num_heads, num_kv_heads, head_dim, in_features, rope_theta)
        check_layer(
            flags={"use_bias": use_bias, "qk_norm": qk_norm, "use_sinks": use_sinks},
            dtypes={"dtype": dtype, "param_dtype": param_dtype},
            head_axis=head_axis,
            rope_theta=rope_theta,
            norm_eps=norm_eps,
            out_features=out_features,
        )
        self.pattern: Any = as_layer_pattern(pattern)
        self.heads = LayerHeads(num_heads, num_kv_heads, head_dim, head_axis)
        self.in_features = in_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.norm_eps = norm_eps
        self.scale = scale
        self.logits_soft_cap = logits_soft_cap
        self.query_spec = query_spec
        self.implementation = implementation

        linear = {
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "rngs": rngs,
        }
        self.query = nnx.LinearGeneral(in_features, (num_heads, head_dim), kernel_init=kernel_init, **linear)
        self.key = nnx.LinearGeneral(in_features, (num_kv_heads, head_dim), kernel_init=kernel_init, **linear)
        self.value = nnx.LinearGeneral(in_features, (num_kv_heads, head_dim), kernel_init=kernel_init, **linear)
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            in_features if out_features is None else out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            **linear,
        )
        self.query_gain = nnx.Param(jnp.ones(head_dim, param_dtype)) if qk_norm else None
        self.key_gain = nnx.Param(jnp.ones(head_dim, param_dtype)) if qk_norm else None
        self.sinks = nnx.Param(jnp.zeros(num_heads, param_dtype)) if use_sinks else None

    @explains_unknown_arguments
    def __call__(
        self,
        x: Float[Array, "b t f"],
        kv: Float[Array, "b s f"] | None = None,
        *,
        positions: Int[Array, "b t"] | Int[Array, "t"] | None = None,
        kv_positions: Int[Array, "b s"] | Int[Array, "s"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        kv_segment_ids: Int[Array, "b s"] | None = None,
        query_offset: int | Int[Array, ""] | Int[Array, "b"] = 0,
        pattern: Any = None,
    ) -> Float[Array, "b t out_features"]:
        """Attends from `x` to itself, or to `kv` if that is given.

        Args:
            x: input of the queries, and of keys and values too in self attention.
            kv: input of keys and values in cross attention, or the whole context of which `x` is a part.
            positions: rotary positions of `x`, by default `query_offset`, `query_offset + 1`, ... The pattern ignores
                them: it counts places in the array.
            kv_positions: rotary positions of `kv`, by default 0, 1, ...
            segment_ids: a token attends to tokens of its own segment only.
            kv_segment_ids: segments of `kv`.
            query_offset: place of `x[:, 0]` among the tokens of `kv`.
            pattern: replaces the layer's own for this call, for instance a traced `s2jax.BlockSelection`.

        Returns:
            The output, in the layer's dtype.

        Raises:
            ValueError: shapes or dtypes do not fit, positions are given without `rope_theta`, or arguments of cross
                attention without `kv`.
        """
        if kv is None:
            check_self_attention(kv_positions, kv_segment_ids, query_offset)
            kv, kv_positions, kv_segment_ids = x, positions, segment_ids
        pattern = self.pattern if pattern is None else pattern
        query = self.queries(x, positions, query_offset=query_offset)
        axes = self._split_over(query, pattern)
        key, value = self.keys_values(kv, kv_positions)
        heads = attention(
            query,
            key,
            value,
            pattern,
            scale=self.scale,
            query_offset=query_offset,
            query_segment_ids=segment_ids,
            kv_segment_ids=kv_segment_ids,
            logits_soft_cap=self.logits_soft_cap,
            sinks=_array(self.sinks),
            query_spec=self.query_spec,
            head_axis=axes,
            implementation=self.implementation,
        )
        return self._output(heads, axes)

    @explains_unknown_arguments
    def create_cache(
        self,
        batch: int,
        *,
        max_length: int | None = None,
        max_rollback: int = 0,
        dtype: Dtype | None = None,
        query_spec: PartitionSpec | None = None,
    ) -> KVCache:
        """Creates an empty cache for this layer's keys and values.

        Args:
            batch: count of sequences.
            max_length: see `KVCache.create`.
            max_rollback: see `KVCache.create`.
            dtype: dtype of the stored keys and values, by default the layer's, else that of its parameters.
            query_spec: see `KVCache.create`; by default the layer's.

        Returns:
            The cache; for layers stacked by `nnx.vmap` as many caches, stacked along the same axes.
        """
        cache = KVCache.create(
            self.pattern,
            batch=batch,
            num_heads=self.heads.query,
            num_kv_heads=self.heads.kv,
            head_dim=self.heads.features,
            max_length=max_length,
            max_rollback=max_rollback,
            dtype=dtype or self.dtype or self._parameter_dtype(),
            query_spec=self.query_spec if query_spec is None else query_spec,
            head_axis=self.heads.axis or (),
        )
        stack = self._stack()
        return jax.tree.map(lambda array: jnp.broadcast_to(array, (*stack, *array.shape)), cache) if stack else cache

    def _parameter_dtype(self) -> Any:
        """The dtype of keys and values if the layer has none: the promotion of the parameters' dtypes."""
        leaves = [leaf for name in ("key", "value") for leaf in self._parameters(name)]
        floats = [leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        with jax.numpy_dtype_promotion("standard"):
            return functools.reduce(jnp.promote_types, floats) if floats else self.param_dtype

    def _stack(self) -> tuple[int, ...]:
        """The leading axes of the parameters of layers stacked by `nnx.vmap`; () for a single layer."""
        kernel = self.in_features, self.heads.kv, self.heads.features
        shapes = [leaf.shape for leaf in self._parameters("key")]
        return next((shape[:-3] for shape in shapes if shape[-3:] == kernel), ())

    def _split_over(self, query: Float[Array, "b t h d"], pattern: Any) -> tuple[str, ...]:
        """The axes over which the query's heads are split."""
        return self.heads.split_over(query, pattern, self._parameters("query"))

    def _parameters(self, projection: str) -> list[Array]:
        """The arrays of a projection, which may be wrapped or replaced by something that is no module."""
        return [leaf for leaf in jax.tree.leaves(nnx.state(self).get(projection, {})) if hasattr(leaf, "dtype")]

    def _output(self, heads: Float[Array, "b t h d"], axes: tuple[str, ...]) -> Float[Array, "b t out_features"]:
        """The output projection, summed over the shards of the heads."""
        bias = (lambda: self.out(jnp.zeros_like(heads[:1, :1]))) if self.use_bias else None
        return sum_over(axes, self.out(heads, out_sharding=output_sharding(heads)), bias)

    @explains_unknown_arguments
    def prefill(
        self, x: Float[Array, "b t f"], cache: KVCache, *, counts: Int[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b t out_features"], KVCache]:
        """Attends from a prompt to itself, and begins the cache anew with it; see `KVCache.prefill`."""
        arrays, options = self._for_cache(x, cache, begin=True)
        axes = self._split_over(arrays[0], self.pattern)
        heads, cache = cache.prefill(*arrays, counts=counts, implementation=self.implementation, **options)
        return self._output(heads, axes), cache

    @explains_unknown_arguments
    def extend(
        self, x: Float[Array, "b t f"], cache: KVCache, *, counts: Int[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b t out_features"], KVCache]:
        """Attends from the next tokens of every sequence to the cache and themselves; see `KVCache.extend`."""
        arrays, options = self._for_cache(x, cache, begin=False)
        axes = self._split_over(arrays[0], self.pattern)
        heads, cache = cache.extend(*arrays, counts=counts, **options)
        return self._output(heads, axes), cache

    def _for_cache(
        self, x: Float[Array, "b t f"], cache: KVCache, *, begin: bool
    ) -> tuple[tuple[Array, Array, Array], dict[str, Any]]:
        """Query, key and value of the tokens, and options of attention."""
        positions = cache_positions(cache, self.pattern, x.shape[1], self.rope_theta, begin=begin)
        key, value = self.keys_values(x, positions)
        options = {"scale": self.scale, "logits_soft_cap": self.logits_soft_cap, "sinks": _array(self.sinks)}
        return (self.queries(x, positions), key, value), options

    def queries(
        self,
        x: Float[Array, "b t f"],
        positions: Int[Array, "b t"] | Int[Array, "t"] | None = None,
        *,
        query_offset: int | Int[Array, ""] | Int[Array, "b"] = 0,
    ) -> Float[Array, "b t h d"]:
        """The queries of `x`, normalised and rotated according to the layer's settings."""
        return normalize_and_rotate(
            _with_heads_here(self.query)(x),
            _array(self.query_gain),
            positions,
            query_offset,
            self.rope_theta,
            self.rope_scaling,
            self.norm_eps,
        )

    def keys_values(
        self, x: Float[Array, "b s f"], positions: Int[Array, "b s"] | Int[Array, "s"] | None = None
    ) -> tuple[Float[Array, "b s k d"], Float[Array, "b s k d"]]:
        """The keys of `x`, normalised and rotated as a cache holds them, and its values."""
        key, value = _with_heads_here(self.key)(x), _with_heads_here(self.value)(x)
        gain = _array(self.key_gain)
        return normalize_and_rotate(key, gain, positions, 0, self.rope_theta, self.rope_scaling, self.norm_eps), value


def _array(parameter: nnx.Param | None) -> Array | None:
    return None if parameter is None else parameter[...]


def _with_heads_here(projection: Any) -> Any:
    """The projection, which in a `shard_map` has fewer heads than it was made for: Flax lays the bias out by these."""
    if not isinstance(projection, nnx.LinearGeneral) or projection.bias is None:
        return projection
    features = projection.kernel[...].shape[1:]
    if features == projection.out_features:
        return projection
    projection = nnx.clone(projection)
    projection.out_features = features
    return projection
