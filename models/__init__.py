"""A Llama-style decoder with sparsely-sharded attention, in Flax NNX."""

from models.accounting import flops_per_token, param_count
from models.config import TransformerConfig, hybrid_dense_layers
from models.preset_table import presets
from models.sharding import partition_specs
from models.transformer import Transformer

__all__ = [
    "Transformer",
    "TransformerConfig",
    "flops_per_token",
    "hybrid_dense_layers",
    "param_count",
    "partition_specs",
    "presets",
]
