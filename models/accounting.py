"""Parameter and floating-point operation counts of a model, from its config alone."""

from models.config import TransformerConfig


def param_count(config: TransformerConfig) -> int:
    """Number of parameters of `Transformer(config)`, exactly; tied embeddings count once."""
    queries_and_out = 2 * config.d_model * config.num_heads * config.head_dim
    keys_and_values = 2 * config.d_model * config.num_kv_heads * config.head_dim
    gains = 2 * config.head_dim if config.qk_norm else 0
    feed_forward = 3 * config.d_model * config.d_ff
    norms = 2 * config.d_model
    layer = queries_and_out + keys_and_values + gains + feed_forward + norms
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * config.d_model
    return config.num_layers * layer + embeddings + config.d_model


def flops_per_token(config: TransformerConfig, seq_len: int) -> float:
    """Model FLOPs per token of one training step at sequences of `seq_len` tokens: the numerator of an MFU.

    Counts what the model's definition demands and no more: two operations per multiply-add of a matrix product,
    forward once and backward twice; attention by the blocks that each layer's pattern visits, causality included.
    Recomputation (remat, the logits that a fused backward pass forms again), norms, softmax, rotation and the
    embedding lookup are left out. After PaLM, arXiv 2204.02311, appendix B, which counts all pairs instead.

    Raises:
        ValueError: if `seq_len` is no positive integer.
    """
    if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 1:
        raise ValueError(f"seq_len must be a positive integer, got {seq_len!r}")
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    layer_weights = config.d_model * (heads * config.head_dim + 3 * config.d_ff)
    weights = config.num_layers * layer_weights + config.d_model * config.vocab_size
    causal_keys = (seq_len + 1) / 2  # that a dense causal query reads, on average
    visited_keys = sum(density * causal_keys * layers for density, layers in _densities(config, seq_len))
    multiply_adds = weights + 2 * config.num_heads * config.head_dim * visited_keys
    return 3 * 2 * multiply_adds


def _densities(config: TransformerConfig, seq_len: int) -> list[tuple[float, int]]:
    """Density and number of layers of each pattern in the model."""
    layers = [config.layer_pattern(layer) for layer in range(config.num_layers)]
    return [
        (pattern.density(config.num_heads, config.num_kv_heads, seq_len), layers.count(pattern))
        for pattern in dict.fromkeys(layers)
    ]
