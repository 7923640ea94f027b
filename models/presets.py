"""Models by name: one that trains on two CPU cores, and the shapes of the S2-Attention paper.

The paper, arXiv 2407.17678, trains models of 1.3B and 7B parameters, hybrids of sparse and dense layers, and times the
attention of 1.3B, 7B and 70B models: 16, 32 and 64 heads of width 128. As in its timings, each head here reads its own
block and one in 16, 32 or 64 of the blocks before, so that the heads together read all of them.

Chosen here: all else after Llama 2, with 24, 32 and 80 layers and a vocabulary of 32,000; the first two layers dense;
as many KV heads as query heads. For 70B that takes a feed-forward of 24,576 to come to 70 billion parameters; Llama 2
70B has 28,672 and 8 KV heads, of which stride 64 would let the heads read an eighth of the context.
"""

import types

from models.config import TransformerConfig, hybrid_dense_layers
from s2jax.patterns import LocalStride

PRESETS = types.MappingProxyType(
    {
        # Bytes, and 16 ids to spare for markers such as the beginning of a document. For a context of 1,024 tokens:
        # 4 heads that read 64 tokens back, and every fourth block of 16 beyond, each another fourth.
        "tiny": TransformerConfig(
            vocab_size=272,
            num_layers=4,
            d_model=128,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            d_ff=352,
            pattern=LocalStride(block_size=16, local_blocks=4, vert_stride=4),
            dense_layers=hybrid_dense_layers(4, first=1),
            tie_embeddings=True,
            qk_norm=True,
            dtype="float32",
        ),
        "s2-1.3b": TransformerConfig(
            vocab_size=32_000,
            num_layers=24,
            d_model=2048,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            d_ff=5504,
            pattern=LocalStride(block_size=64, local_blocks=1, vert_stride=16),
            dense_layers=hybrid_dense_layers(24, first=2),
            remat="full",
        ),
        "s2-7b": TransformerConfig(
            vocab_size=32_000,
            num_layers=32,
            d_model=4096,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            d_ff=11_008,
            pattern=LocalStride(block_size=64, local_blocks=1, vert_stride=32),
            dense_layers=hybrid_dense_layers(32, first=2),
            remat="full",
        ),
        "s2-70b": TransformerConfig(
            vocab_size=32_000,
            num_layers=80,
            d_model=8192,
            num_heads=64,
            num_kv_heads=64,
            head_dim=128,
            d_ff=24_576,
            pattern=LocalStride(block_size=64, local_blocks=1, vert_stride=64),
            dense_layers=hybrid_dense_layers(80, first=2),
            remat="full",
        ),
    }
)
