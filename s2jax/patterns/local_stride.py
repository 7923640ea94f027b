"""The pattern of S2-Attention: a local window, and beyond it one block in `vert_stride`, different for each head."""

import dataclasses

from s2jax.patterns.bands import UNBOUNDED
from s2jax.patterns.checks import Window, check_count, check_window, window_sides
from s2jax.patterns.striped import Residues, Striped, Stripes


@dataclasses.dataclass(frozen=True, repr=False)
class LocalStride(Striped):
    """The sparsely-sharded pattern of S2-Attention (arXiv 2407.17678) and its DKernel library.

    With query block i, key block j, V = `vert_stride` and κ the query head's KV head, a head reads

        i - j < local_blocks   or   (j + r(κ)) mod V = 0   or   everything, if it is a dense head

    and, if `causal`, no token after its own; if not, the window reaches as far ahead as behind.

    Attributes:
      block_size: tokens in a block, a power of two from 16.
      local_blocks: blocks in the window, the query's own included; if not causal, also a pair (left, right), with the
        own block on both sides.
      vert_stride: distance between the blocks that are read beyond the window; 1 reads all.
      head_step: r(κ) = κ · head_step + head_offset. None spreads the KV heads evenly over the stride:
        r(κ) = ⌊κ · V / num_kv_heads⌋ + head_offset.
      homo_head: every head reads the same stripes, those of κ = 0.
      num_dense_heads: count of KV heads, the last ones, that read everything.
      residues: "kv_head": the heads of one group share their stripes, so that a KV head keeps only these.
        "query_head": every query head has stripes of its own (as in Phi-3-small), and κ above is the query head.
      causal: True: no query reads a token after its own.
    """

    block_size: int = 64
    local_blocks: Window = 16
    vert_stride: int = 8
    head_step: int | None = None
    head_offset: int = 0
    homo_head: bool = False
    num_dense_heads: int = 0
    residues: Residues = "kv_head"
    causal: bool = True

    def __post_init__(self):
        check_window("local_blocks", self.local_blocks, self.causal)
        check_count("vert_stride", self.vert_stride, at_least=1)
        self.check_head_parameters()

    def stripes(self, heads, head):
        left, right = window_sides(self.local_blocks, self.causal)
        stripes = Stripes(-UNBOUNDED, UNBOUNDED, self.vert_stride, *self.residues_of(heads, head))
        return [Stripes(1 - right, left, 1, 0), stripes]
