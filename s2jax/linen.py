"""Sparsely-sharded attention as a Flax Linen layer, and as `attention_fn` of `nn.MultiHeadDotProductAttention`."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.linear import default_kernel_init
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.head_place import HeadAxis
from pallas_kernels.unknown_arguments import explains_unknown_arguments, unknown_argument
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
    sum_over,
)
from s2jax.rotary import RopeScaling, normalize_and_rotate

__all__ = ["S2Attention", "attention_fn"]


class S2Attention(nn.Module):
    """Multi-head attention in which each head reads the keys that a pattern gives it.

    The Linen version of `s2jax.nnx.S2Attention`, whose docstring explains the attributes. Parameters have the same
    names and shapes, so that the weights of either serve the other:

        params = nnx.to_pure_dict(nnx.state(nnx_layer, nnx.Param))   # linen_layer.apply({"params": params}, x)
        nnx.update(nnx_layer, params)                                # and back

    The width of the input is that of the first input, which is the default of `out_features`.

    Raises:
        ValueError: when called, if head counts, shapes or arguments do not fit together.
    """

    num_heads: int
    pattern: Any
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = default_kernel_init
    out_kernel_init: Initializer | None = None
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-6
    use_sinks: bool = False
    scale: float | None = None
    logits_soft_cap: float | None = None
    query_spec: PartitionSpec | None = None
    head_axis: HeadAxis = None
    implementation: str | tuple[str, ...] | None = None

    def __post_init__(self):
        check_layer(
            flags={"use_bias": self.use_bias, "qk_norm": self.qk_norm, "use_sinks": self.use_sinks},
            dtypes={"dtype": self.dtype, "param_dtype": self.param_dtype},
            head_axis=self.head_axis,
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
            out_features=self.out_features,
        )
        object.__setattr__(self, "pattern", as_layer_pattern(self.pattern))
        super().__post_init__()

    def __new__(cls, *args, **kwargs):
        """Raises TypeError with advice on an attribute that the layer does not have."""
        del args
        for name in kwargs:
            if name not in cls.__dataclass_fields__:
                raise TypeError(unknown_argument(cls.__name__, name, list(cls.__dataclass_fields__)))
        return super().__new__(cls)

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
        """Attends from `x` to itself, or to `kv` if given; the arguments are those of `s2jax.nnx.S2Attention`."""
        if kv is None:
            check_self_attention(kv_positions, kv_segment_ids, query_offset)
            kv, kv_positions, kv_segment_ids = x, positions, segment_ids
        how = {
            "query_offset": query_offset,
            "query_segment_ids": segment_ids,
            "kv_segment_ids": kv_segment_ids,
            "query_spec": self.query_spec,
            "implementation": self.implementation,
        }

        pattern = self.pattern if pattern is None else pattern

        def attend(query, key, value, axes, **options):
            return attention(query, key, value, pattern, head_axis=axes, **how, **options), None

        return self._attended(x, kv, positions, kv_positions, query_offset, pattern, attend)[0]

    @explains_unknown_arguments
    def create_cache(
        self,
        batch: int,
        in_features: int,
        *,
        max_length: int | None = None,
        max_rollback: int = 0,
        dtype: Dtype | None = None,
    ) -> KVCache:
        """Creates an empty cache for this layer's keys and values, sharded by its `query_spec`.

        Args:
            batch: count of sequences.
            in_features: width of the layer's input.
            max_length: see `KVCache.create`.
            max_rollback: see `KVCache.create`.
            dtype: dtype of the stored keys and values, by default the layer's, else that of its parameters.

        For layers under `nn.scan` or `nn.vmap`, stack as many: `jax.tree.map(lambda x: jnp.stack([x] * n), cache)`.
        """
        num_kv_heads, head_dim = self._head_counts(in_features)
        return KVCache.create(
            self.pattern,
            batch=batch,
            num_heads=self.num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_length=max_length,
            max_rollback=max_rollback,
            dtype=dtype or self.dtype or self.param_dtype,
            query_spec=self.query_spec,
            head_axis=self.head_axis or (),
        )

    @explains_unknown_arguments
    def prefill(
        self, x: Float[Array, "b t f"], cache: KVCache, *, counts: Int[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b t out_features"], KVCache]:
        """Attends from a prompt to itself, and begins the cache anew with it; see `KVCache.prefill`.

        `layer.apply({"params": params}, x, cache, method="prefill")`; `extend` likewise.
        """
        attend = functools.partial(cache.prefill, counts=counts, implementation=self.implementation)
        return self._cached(x, cache, attend, begin=True)

    @explains_unknown_arguments
    def extend(
        self, x: Float[Array, "b t f"], cache: KVCache, *, counts: Int[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b t out_features"], KVCache]:
        """Attends from the next tokens of every sequence to the cache and themselves; see `KVCache.extend`."""
        return self._cached(x, cache, functools.partial(cache.extend, counts=counts), begin=False)

    def _cached(self, x, cache, attend, *, begin: bool):
        positions = cache_positions(cache, self.pattern, x.shape[1], self.rope_theta, begin=begin)

        def of_shard(query, key, value, axes, **options):
            return attend(query, key, value, **options)  # the cache knows its axes

        return self._attended(x, x, positions, positions, 0, self.pattern, of_shard)

    @nn.compact
    def _attended(self, x, kv, positions, kv_positions, query_offset, pattern, attend):
        """The layer's output by `attend(query, key, value, axes, **options)`, and that function's second result."""
        in_features = x.shape[-1]
        num_kv_heads, head_dim = self._head_counts(in_features)
        layer = LayerHeads(self.num_heads, num_kv_heads, head_dim, self.head_axis)
        num_heads, num_kv_heads = layer.here()
        query = self._project("query", (num_heads, head_dim))(x)
        key = self._project("key", (num_kv_heads, head_dim))(kv)
        value = self._project("value", (num_kv_heads, head_dim))(kv)
        axes = layer.split_over(query, pattern, self.variables.get("params", {}).get("query", {}))

        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        query_gain = self.param("query_gain", ones, (head_dim,), self.param_dtype) if self.qk_norm else None
        key_gain = self.param("key_gain", ones, (head_dim,), self.param_dtype) if self.qk_norm else None
        sinks = self.param("sinks", zeros, (num_heads,), self.param_dtype) if self.use_sinks else None

        heads, besides = attend(
            self._rotated(query, query_gain, positions, query_offset),
            self._rotated(key, key_gain, kv_positions, 0),
            value,
            axes,
            scale=self.scale,
            logits_soft_cap=self.logits_soft_cap,
            sinks=sinks,
        )
        out_features = in_features if self.out_features is None else self.out_features
        project = self._project("out", out_features, axis=(-2, -1), kernel_init=self.out_kernel_init)
        bias = (lambda: project(jnp.zeros_like(heads[:1, :1]))) if self.use_bias else None
        return sum_over(axes, project(heads), bias), besides

    def _head_counts(self, in_features: int) -> tuple[int, int]:
        return head_counts(self.num_heads, self.num_kv_heads, self.head_dim, in_features, self.rope_theta)

    def _rotated(self, heads, gain, positions, offset) -> Float[Array, "b t heads d"]:
        return normalize_and_rotate(heads, gain, positions, offset, self.rope_theta, self.rope_scaling, self.norm_eps)

    def _project(
        self, name: str, features: int | tuple[int, ...], axis: int | tuple[int, ...] = -1, kernel_init=None
    ) -> nn.DenseGeneral:
        return nn.DenseGeneral(
            features,
            axis=axis,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=kernel_init or self.kernel_init,
            name=name,
        )
