"""The decoder: embedding, layers of attention and SwiGLU with RMS norms before them, output projection."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from models.config import TransformerConfig
from models.sharding import batch_spec, cache_spec, left_to_xla
from s2jax.cache import KVCache
from s2jax.nnx import S2Attention
from s2jax.rotary import rms_norm

EMBEDDING_INIT = nnx.initializers.normal(0.02)


class RMSNorm(nnx.Module):
    """RMS norm over the last axis with a learned gain `scale` [f], computed in float32."""

    def __init__(self, features: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... f"]) -> Float[Array, "... f"]:
        return rms_norm(x, self.scale[...], self.epsilon)


class Embedding(nnx.Module):
    """A float32 table `embedding` [v, f], to look tokens up and, if tied, to score them."""

    def __init__(self, vocab_size: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(EMBEDDING_INIT(rngs.params(), (vocab_size, features), jnp.float32))

    @jax.named_scope("embed")
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t f"]:
        # By default JAX wraps a negative id around and clamps one that is too large: both would go unseen.
        rows = jnp.asarray(self.embedding[...]).at[tokens]
        return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=batch_spec(tokens))

    def logits(self, x: Float[Array, "b t f"]) -> Float[Array, "b t v"]:
        """Scores each token of the vocabulary, accumulated in float32."""
        return jnp.einsum("btf,vf->btv", x, self.embedding[...].astype(x.dtype), preferred_element_type=jnp.float32)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`. Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        linear = {"use_bias": False, "dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.gate = nnx.Linear(config.d_model, config.d_ff, kernel_init=fan_in(), **linear)
        self.up = nnx.Linear(config.d_model, config.d_ff, kernel_init=fan_in(), **linear)
        self.down = nnx.Linear(config.d_ff, config.d_model, kernel_init=fan_in(config.num_layers), **linear)

    def __call__(self, x: Float[Array, "b t f"]) -> Float[Array, "b t f"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x), out_sharding=batch_spec(x))


class DecoderLayer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: TransformerConfig, layer: int, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = S2Attention(
            config.d_model,
            config.num_heads,
            config.layer_pattern(layer),
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=jnp.dtype(config.dtype),
            kernel_init=fan_in(),
            out_kernel_init=fan_in(config.num_layers),
            rope_theta=config.rope_theta,
            rope_scaling=config.rope_scaling,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            head_axis=(),  # nothing else of the model is split within a shard_map either
            implementation=config.implementation,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config, rngs=rngs)
        self.remat = config.remat

    def __call__(self, x: Float[Array, "b t f"], positions=None, segment_ids=None) -> Float[Array, "b t f"]:
        @jax.named_scope("attention")
        def attend(x):
            x = self.attention_norm(x)
            return self.attention(x, positions=positions, segment_ids=segment_ids)

        def layer(x):
            x = x + (keep_attention(attend)(x) if self.remat == "attention" else attend(x))
            return x + self._feed_forward(x)

        return (keep_attention(layer) if self.remat == "full" else layer)(x)

    def cached(
        self, x: Float[Array, "b t f"], cache: KVCache, counts: Int[Array, " b"] | None, *, begin: bool
    ) -> tuple[Float[Array, "b t f"], KVCache]:
        """The layer on a prompt, or on the next tokens of every sequence."""
        attend = self.attention.prefill if begin else self.attention.extend
        with jax.named_scope("attention"):
            out, cache = attend(self.attention_norm(x), cache, counts=counts)
        x = x + out
        return x + self._feed_forward(x), cache

    @jax.named_scope("mlp")
    def _feed_forward(self, x: Float[Array, "b t f"]) -> Float[Array, "b t f"]:
        return self.mlp(self.mlp_norm(x))


class Transformer(nnx.Module):
    """A decoder-only language model after Llama, some or all of whose layers attend sparsely.

    Parameters are float32 and live under `embed.embedding` [v, f], `layers.<i>.{attention, attention_norm, mlp,
    mlp_norm}`, `final_norm.scale` [f] and, unless the embeddings are tied, `lm_head.kernel` [f, v].

    Keys are rotated before the attention, so that a cache can hold them rotated.

    Args:
        config: shape and numerics.
        rngs: source of the initial parameters: truncated normal with the variance of the fan-in; projections into
            the residual stream are smaller by `(2 * num_layers) ** 0.5`, so that it keeps its size through the
            layers (GPT-2, section 2.3); embeddings and output projection with standard deviation 0.02.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.d_model, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, layer, rngs=rngs) for layer in range(config.num_layers)])
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else _output_projection(config, rngs)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | Int[Array, "t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Logits of each next token.

        Args:
            tokens: int32 ids. An id outside the vocabulary gives NaN logits rather than those of another token.
            positions: rotary positions, by default 0, 1, ...; in packed sequences they start anew in each document.
            segment_ids: int32 document of each token; tokens attend within their own document.

        Returns:
            float32 logits.

        Raises:
            ValueError: if `tokens` are no integers of shape [b, t], or the other arrays do not fit them.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be integer ids of shape [batch, length], got {tokens.dtype} {list(tokens.shape)}"
            )
        x = self.embed(tokens).astype(self.config.dtype)
        for layer in self.layers:
            x = run_layer(*nnx.split(layer), x, positions, segment_ids)
        return self._logits(x)

    def create_caches(
        self, batch: int, *, max_length: int | None = None, max_rollback: int = 0, dtype: Any = None
    ) -> tuple[KVCache, ...]:
        """Empty caches, one for each layer; see `KVCache.create`.

        Under a mesh they are split like the queries: sequences over "data" and "fsdp", heads like the parameters.

        Args:
            batch: number of sequences.
            max_length: tokens of the longest sequence; None for patterns of bounded reach.
            max_rollback: tokens that a rollback may take back.
            dtype: of what is stored, by default `config.dtype`.
        """
        settings = {"max_length": max_length, "max_rollback": max_rollback, "dtype": dtype}
        return tuple(
            layer.attention.create_cache(batch, query_spec=cache_spec(layer.attention.query.kernel[...]), **settings)
            for layer in self.layers
        )

    def prefill(
        self,
        tokens: Int[Array, "b t"],
        caches: tuple[KVCache, ...],
        *,
        counts: Int[Array, " b"] | None = None,
        last: bool = True,
    ) -> tuple[Float[Array, "b n v"], tuple[KVCache, ...]]:
        """Begins every sequence with a prompt.

        Args:
            tokens: int32 ids of the prompts, padded to one length.
            caches: of `create_caches`. What is done to one, such as a rollback, is to be done to all: the logits of
                sequences whose lengths differ between layers are NaN.
            counts: tokens of each prompt; those after them are padding.
            last: gives the logits of each prompt's last token alone, which is what one samples from: n is 1, else t.

        Returns:
            float32 logits, and the caches.

        Raises:
            ValueError: see `KVCache.prefill`.
        """
        return self._cached(tokens, caches, counts, last, begin=True)

    def extend(
        self,
        tokens: Int[Array, "b t"],
        caches: tuple[KVCache, ...],
        *,
        counts: Int[Array, " b"] | None = None,
        last: bool = False,
    ) -> tuple[Float[Array, "b n v"], tuple[KVCache, ...]]:
        """Appends tokens to every sequence: a chunk of its prompt, or one or several to go on with.

        Arguments, results and errors are those of `prefill`.
        """
        batch = batch_spec(tokens)
        if batch is None:
            return self._cached(tokens, caches, counts, last, begin=False)
        graph, state = nnx.split(self)

        def extended(state, tokens, caches, counts):
            return nnx.merge(graph, state)._cached(tokens, caches, counts, last, begin=False)

        # XLA chooses how activations are split: those of a few tokens are smaller than the weights.
        logits = PartitionSpec(*batch, None, jax.typeof(self.embed.embedding[...]).sharding.spec[0])
        out_specs = logits, jax.tree.map(lambda array: jax.typeof(array).sharding.spec, caches)
        return left_to_xla(extended, out_specs)(state, tokens, caches, counts)

    def _cached(self, tokens, caches, counts, last: bool, *, begin: bool):
        if len(caches) != len(self.layers):
            raise ValueError(f"a model of {len(self.layers)} layers needs as many caches, got {len(caches)}")
        x, after = self.embed(tokens).astype(self.config.dtype), []
        alike: dict[tuple, KVCache] = {}
        for layer, cache in zip(self.layers, caches, strict=True):
            cache = cache.share_lengths_with(alike.setdefault(cache.arrangement, cache))
            x, cache = run_cached_layer(begin, *nnx.split(layer), x, cache, counts)
            after.append(cache)
        if last:
            end = jnp.full(len(x), x.shape[1], jnp.int32) if counts is None else counts
            x = jnp.take_along_axis(x, jnp.maximum(end - 1, 0)[:, None, None], 1)
        logits = self._logits(x)
        if not begin:
            apart = functools.reduce(jnp.logical_or, (cache.lengths != caches[0].lengths for cache in caches))
            logits = jnp.where(apart[:, None, None], jnp.nan, logits)
        return logits, tuple(after)

    @jax.named_scope("logits")
    def _logits(self, x: Float[Array, "b t f"]) -> Float[Array, "b t v"]:
        x = self.final_norm(x)
        return self.embed.logits(x) if self.lm_head is None else self.lm_head(x)


@functools.partial(jax.jit, static_argnums=0)
def run_layer(graph: nnx.GraphDef, state: nnx.State, x: Array, positions, segment_ids) -> Array:
    """`DecoderLayer.__call__`, traced and lowered once for all layers of one kind, not once for each layer."""
    return nnx.merge(graph, state)(x, positions, segment_ids)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_cached_layer(begin: bool, graph: nnx.GraphDef, state: nnx.State, x: Array, cache: KVCache, counts):
    """`DecoderLayer.cached`, traced once for all layers of one kind."""
    return nnx.merge(graph, state).cached(x, cache, counts, begin=begin)


def _output_projection(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        config.d_model,
        config.vocab_size,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=EMBEDDING_INIT,
        preferred_element_type=jnp.float32,
        rngs=rngs,
    )


def fan_in(residual_layers: int | None = None) -> nnx.Initializer:
    """Truncated normal with variance 1 / fan_in, over 2 * residual_layers for projections into the residual stream."""
    return nnx.initializers.variance_scaling(
        1 / (2 * residual_layers if residual_layers else 1), "fan_in", "truncated_normal"
    )


def keep_attention(function):
    """`function`, of whose intermediates the backward pass keeps the attention's `out` and `lse`, and no others."""
    return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names("s2jax_out", "s2jax_lse"))
