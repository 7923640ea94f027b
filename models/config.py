"""Shape and numerics of a decoder: `TransformerConfig`, its fields, and the dense layers of a hybrid."""

import dataclasses
from typing import Any, Literal, get_args

from s2jax.patterns import Dense, Pattern, as_pattern
from s2jax.rotary import RopeScaling

ComputeDtype = Literal["bfloat16", "float32"]
RematPolicy = Literal["none", "attention", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerFields:
    """The fields of `TransformerConfig`, as they are also the flags of train.py."""

    vocab_size: int
    """Token ids are 0 to this less 1; byte-level text needs 257."""
    num_layers: int
    """Decoder layers."""
    d_model: int
    """Width of the residual stream."""
    num_heads: int
    """Query heads of a layer."""
    num_kv_heads: int
    """KV heads of a layer, a divisor of the query heads."""
    head_dim: int
    """Width of a head."""
    d_ff: int
    """Inner width of the feed-forward."""
    pattern: Any
    """Who reads whom in the sparse layers, such as 'LocalStride(64, 16, 8) | FirstBlocks(1)'."""
    dense_layers: tuple[int, ...] = ()
    """Layers whose attention is dense: their indices, the first layer being 0."""
    tie_embeddings: bool = False
    """Use the transposed embedding as the output projection."""
    qk_norm: bool = False
    """RMS-normalise queries and keys, with a learned gain."""
    rope_theta: float = 10_000.0
    """Base of the rotary positions."""
    rope_scaling: tuple[float, float, float, int] | None = None
    """Llama 3.1's: factor, low and high frequency factor, original length."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMS norm."""
    dtype: ComputeDtype = "bfloat16"
    """Type that activations are computed in; the parameters are float32 always."""
    remat: RematPolicy = "none"
    """Parts that the backward pass recomputes to save memory; the attention's own output is always kept."""
    implementation: Any = None
    """Attention backend: auto picks by platform; xla or reference asks for just that one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(TransformerFields):
    """Shape and numerics of a Llama-style decoder with sparsely-sharded attention; see `TransformerFields`.

    Parameters, norms, softmax and logits are float32 always. On a mesh of several devices the model runs under
    `jax.set_mesh`, with Explicit axes: see `models.sharding`.

    Attributes:
        pattern: who reads whom in the sparse layers; causal.
        rope_scaling: a `s2jax.RopeScaling` or its four numbers.
        remat: what the backward pass recomputes: "none"; "attention", the norm, projections and rotation around
            each attention; "full", whole layers. The attention itself is never run again: its output and
            log-sum-exp are kept.
        implementation: backend or backends of the attention, see `s2jax.attention`; None picks by platform.

    Raises:
        ValueError: if a value is out of range or two do not fit together.
    """

    pattern: Pattern
    rope_scaling: RopeScaling | None = None
    implementation: str | tuple[str, ...] | None = None

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a positive integer, got {count!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, so that the KV heads serve groups of equal size; "
                f"got num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        object.__setattr__(self, "pattern", as_pattern(self.pattern))
        if not self.pattern.causal:
            raise ValueError(f"a decoder needs a causal pattern, got the bidirectional {self.pattern!r}")
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", RopeScaling(*self.rope_scaling))
            self.rope_scaling.check()
        self._check_dense_layers()
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name, choices in (("dtype", get_args(ComputeDtype)), ("remat", get_args(RematPolicy))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")

    def _check_dense_layers(self):
        layers = tuple(self.dense_layers)
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self.num_layers for i in layers):
            raise ValueError(f"dense_layers must be layer indices from 0 to {self.num_layers - 1}, got {layers}")
        if len(set(layers)) != len(layers):
            raise ValueError(f"dense_layers must name each layer once, got {layers}")
        object.__setattr__(self, "dense_layers", tuple(sorted(layers)))  # so that equal models have equal configs

    def layer_pattern(self, layer: int) -> Pattern:
        """The pattern that layer `layer` attends by."""
        return Dense() if layer in self.dense_layers else self.pattern


def hybrid_dense_layers(num_layers: int, *, first: int = 1, every: int | None = None) -> tuple[int, ...]:
    """The dense layers of a hybrid: the first `first`, and of those after them the last of each `every`.

    `hybrid_dense_layers(12, first=2, every=4)` is `(0, 1, 5, 9)`. Source: S2-Attention, arXiv 2407.17678, which
    keeps the first layers dense because attention spreads most widely there.

    Raises:
        ValueError: if `first` is negative or exceeds `num_layers`, or `every` is below 1.
    """
    if not 0 <= first <= num_layers:
        raise ValueError(f"first must be from 0 to num_layers={num_layers}, got {first}")
    if every is not None and every < 1:
        raise ValueError(f"every must be at least 1 (each layer dense) or None (no more dense layers), got {every}")
    return tuple(i for i in range(num_layers) if i < first or (every is not None and (i - first + 1) % every == 0))
