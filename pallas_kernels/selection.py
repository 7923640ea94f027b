"""Blocks chosen under `jit`, by a gate or a router."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSelection:
    """The key blocks that every block of queries reads; given in a pattern's place.

    Row r holds the queries r · query_block to (r + 1) · query_block - 1 of the call, whatever their positions. A row
    reads the first `counts` of its `kv_blocks`, which are distinct and in any order; with `causal`, no key after the
    query's own position. Blocks beyond the keys are empty.

    Attributes:
      kv_blocks: int32 [b|1, h|k|1, rows, max_blocks].
      counts: int32 [b|1, h|k|1, rows], at most max_blocks.
      block_size: tokens in a key block.
      query_block: queries in a row.
      causal: True if a query reads no key after its own position.
    """

    kv_blocks: Int32[Array, "#b #h rows max_blocks"]
    counts: Int32[Array, "#b #h rows"]
    block_size: int = dataclasses.field(default=64, metadata={"static": True})
    query_block: int = dataclasses.field(default=64, metadata={"static": True})
    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def top_k(
        cls,
        scores: Float[Array, "#b #h rows blocks"],
        k: int,
        *,
        block_size: int = 64,
        query_block: int = 64,
        causal: bool = True,
        query_offset: Int[Array, ""] | int = 0,
    ) -> "BlockSelection":
        """The `k` key blocks with the highest scores for every row; a block with score -inf is never chosen.

        Args:
          scores: of every key block for every row. With `causal`, blocks that begin after a row's last query are left
            out, whatever their score.
          query_offset: position of the first query among the keys.

        Raises:
          ValueError: `k` is not between 1 and the number of blocks.
        """
        if jnp.ndim(scores) != 4:
            raise ValueError(f"scores must be [b|1, h|k|1, rows, blocks], got {jnp.shape(scores)}")
        rows, blocks = scores.shape[-2:]
        if not isinstance(k, int) or not 1 <= k <= blocks:
            raise ValueError(f"k must be between 1 and the number of blocks, {blocks}, got {k!r}")
        scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
        if causal:
            last_query = query_offset + (jnp.arange(rows) + 1) * query_block - 1
            visible = jnp.arange(blocks) * block_size <= last_query[:, None]
            scores = jnp.where(visible, scores, -jnp.inf)
        best, kv_blocks = jax.lax.top_k(jax.lax.stop_gradient(scores), k)
        counts = (best > -jnp.inf).sum(-1, dtype=jnp.int32)
        return cls(kv_blocks.astype(jnp.int32), counts, block_size, query_block, causal)
